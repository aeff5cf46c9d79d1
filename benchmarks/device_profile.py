"""A few steps of each kind under torch's profiler: how long the device is busy in one, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from benchmarks.device_meter import DECODE, PREFILL, Step

_STEPS = {PREFILL: 4, DECODE: 12}
_SETTLED = 2
"""Steps of a kind before the first profiled one."""
_ROWS = 25


@dataclass(frozen=True)
class Profiled:
    """Some steps of one kind in a row."""

    steps: int
    fewest: int
    """Sequences in a step; `most` likewise."""
    most: int
    busy: float
    """Seconds a step in which the device computes or copies; 0 on a CPU."""
    table: str
    """The operations that took most time."""


class StepProfiler:
    """Takes some settled steps of each kind in a pass, as its `Meter.on_step`. Starts and stops on the engine's thread,
    with the device idle at both ends. A run of steps that ends too soon is given up for a later one."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.profiled: dict[str, Profiled] = {}
        self._run: list[Step] = []
        self._active: Any = None
        # The profiler's own start takes seconds, and wants the main thread.
        with self._profile():
            torch.ones(1, device=device).add_(1)

    def __call__(self, step: Step) -> None:
        kind = step.kind
        broken = bool(self._run) and self._run[-1].kind != kind
        self._run = [step] if broken else [*self._run, step]
        if self._active is not None:
            if broken:
                self._stop()
            elif len(self._run) == _SETTLED + _STEPS[kind]:
                self.profiled[kind] = self._read(self._stop(), self._run[_SETTLED:])
        elif kind not in self.profiled and len(self._run) == _SETTLED:
            self._wait()
            self._active = self._profile()
            self._active.start()

    def close(self) -> None:
        """After the pass: a run of steps that it cut short is given up."""
        if self._active is not None:
            self._stop()

    def _profile(self) -> profile:
        return profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU])

    def _stop(self) -> Any:
        self._wait()
        active, self._active = self._active, None
        active.stop()
        return active

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _read(self, profiled: Any, steps: Sequence[Step]) -> Profiled:
        column = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        table = profiled.key_averages().table(sort_by=column, row_limit=_ROWS, max_name_column_width=90)
        counts = [step.rows for step in steps]
        busy = _busy(profiled) / len(steps) if self.cuda else 0.0
        return Profiled(len(steps), min(counts), max(counts), busy, table)


def _busy(profiled: Any) -> float:
    """Seconds in which anything ran on the device; what ran side by side counts once."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA
    )
    busy = reached = 0.0
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy / 1e6
