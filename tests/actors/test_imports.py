"""`actors` hides torchvision from transformers, in time or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", ["transformers", "actors"])
def test_models_import_whichever_comes_first(first: str, tmp_path: Path) -> None:
    """Where a torchvision is installed: one that works after transformers has seen it, any at all before."""
    package = tmp_path / "torchvision"
    (package / "transforms" / "v2").mkdir(parents=True)
    works = first == "transformers"
    (package / "__init__.py").write_text("" if works else "raise RuntimeError('built for another torch')")
    (package / "transforms" / "__init__.py").write_text(
        "from unittest.mock import MagicMock; InterpolationMode = MagicMock()"
    )
    (package / "transforms" / "functional.py").write_text("pil_to_tensor = None")
    (package / "transforms" / "v2" / "__init__.py").write_text("functional = None")
    (package / "io.py").write_text("")
    looks = "import transformers.utils as u; u.is_torchvision_available(); import actors"
    script = f"{looks if works else 'import actors'}\nfrom transformers import AriaConfig\nAriaConfig()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
