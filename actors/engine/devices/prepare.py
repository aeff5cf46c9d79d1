"""What the engine derives from the device it runs on: the paths that proved themselves there, the cache and its
size, and what a step may hold.

These are no knobs. Memory that is free after the weights are loaded is the cache; the rest follows from
what keeps that kind of device busy.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from actors.engine.devices.base import Device
from actors.engine.devices.cpu.prepare import prepare_cpu
from actors.engine.devices.cuda.prepare import prepare_cuda
from actors.engine.scheduler import Limits
from actors.families.base import Family


def prepare_device(
    model: PreTrainedModel, family: Family, limits: Limits | None, kv_tokens: int | None
) -> Device:
    """The cache and limits for `model` on its device; its layers are re-arranged for that device. Raises DeviceLost."""
    prepare = prepare_cuda if model.device.type == "cuda" else prepare_cpu
    return prepare(model, family, limits, kv_tokens)
