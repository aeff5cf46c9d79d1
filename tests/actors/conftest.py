"""Loads torchvision, the oracle of the image tests, before `actors` hides it (see actors/__init__.py).

The index's torchvision belongs to CUDA builds of torch: on a CPU build its import misses two operators, whose
schemas are all that its transforms need. Where torchvision is not installed, oracle tests are skipped.
"""

import contextlib
import importlib.util

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # its declarations live as long as it does


def _declare_missing_operators() -> None:
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):  # a matching build has defined it
            _LIBRARY.define(schema)


if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision
    except RuntimeError:
        _declare_missing_operators()
        import torchvision  # noqa: F401
