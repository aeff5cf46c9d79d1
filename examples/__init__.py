"""Job specs, toy checkpoints and data, and the demo."""

import actors  # noqa: F401  before transformers, which a mismatched torchvision would break: see actors/__init__.py
