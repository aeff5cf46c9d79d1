"""What a pass of the engine spends on each kind of step, beside what the device could do in that time.

A step counts whole: from the call of `engine.scheduler.plan()` that planned it to the next one, so planning, encoding
images, computing, sampling and advancing are in it. A step that computes prompt tokens is a prefill step, one of single
tokens alone a decode step. An engine may plan the next step while the device computes this one; so a step's time is
taken only where the step before was of the same kind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from actors.engine.engine import ContinuousEngine
from actors.engine.scheduler import Chunk
from actors.engine.types import Request
from actors.families import Family
from benchmarks.engine_roofline import Peak, Work

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Demand:
    """What a model's steps must compute and read, counted on the stock model before an engine takes it."""

    work: Work
    head: int
    """Parameters of the output layer, which sampled tokens meet."""
    experts: int
    """Parameters of all experts; 0 for a model without."""
    share: float
    """Of the experts, those that one token meets."""
    tile_flops: float
    """Operations to encode one tile of an image, projector included."""

    @classmethod
    def of(cls, model: PreTrainedModel, family: Family, row: Request) -> Demand:
        text = model.config.get_text_config()
        weights = model.model.language_model.layers.named_parameters()
        experts = sum(weight.numel() for name, weight in weights if ".experts." in name and weight.dim() == 3)
        share = text.moe_topk / text.moe_num_experts if experts else 1.0
        return cls(
            Work.of(model), model.lm_head.weight.numel(), experts, share, _tile_flops(model, family, row)
        )

    def flops(self, chunks: Sequence[Chunk]) -> float:
        """Of the text model; attention over the keys that are seen."""
        sampled = sum(chunk.samples for chunk in chunks)
        return sum(map(self.work.flops, chunks)) + 2 * self.head * sampled

    def bytes_of_decoding(self, chunks: Sequence[Chunk]) -> float:
        """Weights once, of the experts those that so many tokens are expected to meet, and the keys and values seen."""
        met = 1 - (1 - self.share) ** len(chunks) - self.share if self.experts else 0.0
        size = self.work.shape.dtype.itemsize
        return self.work.bytes_of_decoding(chunks) + (self.head + met * self.experts) * size


def _tile_flops(model: PreTrainedModel, family: Family, row: Request) -> float:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        family.embed_images(model, torch.tensor(row.pixels, device=model.device), row.layouts)
    return counter.get_total_flops() / len(row.pixels)


@dataclass(frozen=True)
class Rates:
    """What the device can do, measured."""

    flops: float
    """Floating-point operations a second, of a large product."""
    bandwidth: float
    """Bytes a second, read or written, of a large copy or sum."""


def device_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of several large products and copies."""
    peak = Peak(device, dtype)
    for _ in range(10 if device.type == "cuda" else 2):
        peak.sample()
    return Rates(peak.flops, peak.bandwidth)


@dataclass
class Step:
    """One step of a pass."""

    kind: str
    rows: int
    """Sequences in it."""
    begin: float
    """Seconds, by `time.perf_counter`."""
    flops: float
    bytes: float
    tiles: int = 0
    """Encoded in it."""
    end: float = 0.0

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass
class Meter:
    """Watches one pass of an engine. Use as a context around `engine.generate`; the pass must run in it from start to
    end. `on_step` is called by the engine's thread after each step, before the next is planned."""

    engine: ContinuousEngine
    demand: Demand
    on_step: Callable[[Step], None] = lambda step: None
    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0
    """Of the whole pass."""
    encoding: list[Callable[[], float]] = field(default_factory=list)
    """Seconds of each call that encoded images; on CUDA those of its stream."""

    def __enter__(self) -> Meter:
        scheduler, family = self.engine.scheduler, self.engine.family
        self._plan, self._embed = scheduler.plan, family.embed_images
        scheduler.plan = self._watch_plan  # type: ignore[method-assign]
        family.embed_images = self._watch_embed  # type: ignore[method-assign]
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        end = time.perf_counter()
        del (
            self.engine.scheduler.plan,
            self.engine.family.embed_images,
        )  # the instances' own: the classes' stay
        self._close(end)
        self.seconds = end - self._begin

    def _watch_plan(self, *arguments: Any) -> list[Chunk]:
        self._close(time.perf_counter())
        if self.steps:
            self.on_step(self.steps[-1])
        begin = time.perf_counter()
        chunks = self._plan(*arguments)
        if chunks:
            kind = PREFILL if any(chunk.length > 1 for chunk in chunks) else DECODE
            size = self.demand.bytes_of_decoding(chunks) if kind == DECODE else 0.0
            self.steps.append(Step(kind, len(chunks), begin, self.demand.flops(chunks), size))
        return chunks

    def _watch_embed(self, model: PreTrainedModel, pixels: torch.Tensor, layouts: Any) -> Any:
        if self.steps:
            self.steps[-1].tiles += len(pixels)
        if pixels.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            features = self._embed(model, pixels, layouts)
            end.record()
            self.encoding.append(lambda: begin.elapsed_time(end) / 1e3)
            return features
        start = time.perf_counter()
        features = self._embed(model, pixels, layouts)
        seconds = time.perf_counter() - start
        self.encoding.append(lambda: seconds)
        return features

    def _close(self, now: float) -> None:
        if self.steps and not self.steps[-1].end:
            self.steps[-1].end = now

    def settled(self, kind: str) -> list[Step]:
        """Steps of that kind behind one of that kind; all of the kind where there is none."""
        pairs = zip(self.steps, self.steps[1:], strict=False)
        settled = [after for before, after in pairs if before.kind == after.kind == kind]
        return settled or [step for step in self.steps if step.kind == kind]

    def prefill_mfu(self, peak: Rates) -> float:
        """Operations of the text model and of encoding, over those that the device could do in the same time."""
        steps = self.settled(PREFILL)
        operations = sum(step.flops + step.tiles * self.demand.tile_flops for step in steps)
        return operations / sum(step.seconds for step in steps) / peak.flops if steps else 0.0

    def decode_bandwidth(self, peak: Rates) -> float:
        steps = self.settled(DECODE)
        seconds = sum(step.seconds for step in steps)
        return sum(step.bytes for step in steps) / seconds / peak.bandwidth if steps else 0.0

    def encoding_share(self) -> float:
        """Of the pass, the time in which images are encoded (beside other work, where they overlap)."""
        return sum(seconds() for seconds in self.encoding) / self.seconds

    def step_seconds(self, kind: str, fewest: int, most: int) -> float | None:
        """Median seconds of a settled step of that many sequences; None where there was none."""
        found = sorted(step.seconds for step in self.settled(kind) if fewest <= step.rows <= most)
        return found[len(found) // 2] if found else None
