"""Engines turn token ids and pixels into text. `build_engine` is the one place that knows their names."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from actors.engine.engine import ContinuousEngine
from actors.engine.reference import ReferenceEngine
from actors.engine.types import Completion, DeviceLost, Engine, Request, Sampling, row_seed
from actors.families.base import Family

EngineName = Literal["continuous", "reference"]

__all__ = [
    "Completion",
    "DeviceLost",
    "Engine",
    "EngineName",
    "Request",
    "Sampling",
    "build_engine",
    "row_seed",
]


def build_engine(name: EngineName, family: Family, model: PreTrainedModel) -> Engine:
    """The engine of that name over a loaded model, which is then the engine's own."""
    return ContinuousEngine(family, model) if name == "continuous" else ReferenceEngine(family, model)
