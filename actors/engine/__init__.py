"""Engines turn token ids and pixels into text. `build_engine` is the one place that knows their names.

Light: the driver and Preprocess import it for its types. The models' code takes seconds, and comes with an engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from actors.engine.types import Completion, DeviceLost, Engine, Request, Sampling, row_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    if name == "continuous":
        from actors.engine.engine import ContinuousEngine

        return ContinuousEngine(family, model)
    from actors.engine.reference import ReferenceEngine

    return ReferenceEngine(family, model)
