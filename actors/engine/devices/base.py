"""What every device gives the engine: a KV cache (`Cache`), steps over it that attend (`Step`), and what a step may
hold (`Device`)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from actors.engine.devices.proof import Choice
from actors.engine.scheduler import Chunk, Limits


class Attends(Protocol):
    """What a layer of the model meets."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor: ...


class Step(Protocol):
    """Some tokens' view of the cache."""

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes key and value [1, H_kv, N, d] of the step's tokens to their places."""
        ...

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Stores keys and values, then attends causally, each sequence over its own tokens.

        query [1, H, N, d]; key, value [1, H_kv, N, d] -> [1, N, H, d]. With a `window` a token sees that many
        tokens, itself included.
        """
        ...


class Cache(Protocol):
    """A device's keys and values: room for sequences, and the steps over it."""

    capacity: int
    """Tokens it can hold."""

    @property
    def used(self) -> int:
        """Tokens (or pages) in use; 0 once no sequence runs."""
        ...

    def reserve(self, tokens: int, prefix_source: Any = None, shared: int = 0) -> Any:
        """Room for one sequence, or None where there is none now. Its first `shared` tokens will be those of
        `prefix_source`, another reservation, and may stand in the same place."""
        ...

    def release(self, reservation: Any) -> None: ...

    def copy_prefix(self, source: Any, target: Any, tokens: int) -> None:
        """Gives `target` the first `tokens` keys and values of `source`, where they are not the same already."""
        ...

    def bucket(self, rows: int) -> int:
        """How many rows a step of `rows` is to have on this device, padding included."""
        ...

    def step(self, chunks: Sequence[Chunk]) -> Step:
        """The step over `chunks`: decoding ones (length 1) first. Tokens behind theirs are padding."""
        ...


@dataclass(frozen=True, slots=True)
class Device:
    """A device made ready for a model."""

    name: str
    """The processor's or GPU's."""
    cache: Cache
    limits: Limits
    tiles: int
    """Tiles encoded at once."""
    choices: Mapping[str, Choice]
    """The path taken for each part of the work: `attention`, `layers`, `experts`."""


def device_name(device: torch.device) -> str:
    """As a run's record tells it: "NVIDIA H100 80GB HBM3", "AMD EPYC 7763 64-Core Processor"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def keep_patches_together(model: nn.Module) -> None:
    """Makes a vision tower's patches come out one after the other, [tiles, patches, D] without gaps. Otherwise each of
    its layers adds to and normalises a transposed view."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)


def experts_of(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that hold all experts of a layer, in transformers' fused layout."""
    fused = ("gate_up_proj", "down_proj")
    return [
        module
        for module in model.modules()
        if all(isinstance(getattr(module, name, None), nn.Parameter) for name in fused)
    ]


def window_mask(
    queries: int, past: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[queries, past + queries] to add to scores: 0 where a query sees a key, -inf elsewhere. Query i stands at
    position past + i; it sees what is not after it and, with a window, fewer than `window` before it."""
    distance = (
        torch.arange(past, past + queries, device=device)[:, None]
        - torch.arange(past + queries, device=device)[None]
    )
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
