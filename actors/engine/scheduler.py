"""The scheduler of continuous batching with chunked prefill: which sequences run, and what each step computes.

Every step takes one token from each sequence that is decoding and as many prompt tokens of entering
ones as the step's budget allows, all packed side by side. Sequences enter in order of arrival once their whole
reservation (prompt + max_new_tokens) fits, so nothing is preempted and the first in line is never overtaken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from actors.engine.types import Request


@dataclass(slots=True, eq=False)
class SequenceState:
    """A request on its way through the engine."""

    request: Request
    emit: Callable[[Any], None]
    """Takes the completion to whoever submitted the request."""
    placeholders: np.ndarray
    """int64: where in the prompt image features go."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    generated: list[int] = field(default_factory=list)
    pending: int = 0
    """Tokens that were sampled and are on their way to the host."""
    logprobs: list[float] = field(default_factory=list)
    reservation: Any = None
    """What the device's cache gave it; None outside the cache."""
    slot: int = -1
    """Its place among those that run, and where its last token lies on the device."""
    features: Tensor | None = None
    """[placeholders, D] encoded images, until the prompt is computed."""
    prefix_source: SequenceState | None = None
    """A sequence with the same image and prompt start, whose prefix this one copies once it is computed."""
    prefix: int = 0
    """Tokens up to the end of the last image: what sequences with equal `prefix_key` may share."""
    prefix_key: tuple[int, int, int] | None = None
    cancelled: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.token_ids)

    @property
    def reserve(self) -> int:
        """Tokens to reserve: the prompt and all that may be generated."""
        return self.prompt_length + self.request.sampling.max_new_tokens

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prompt_length

    @property
    def sampled(self) -> int:
        """Tokens of its text, those included that the host does not know yet."""
        return len(self.generated) + self.pending

    @property
    def complete(self) -> bool:
        """Whether its text is as long as it may be."""
        return self.sampled >= self.request.sampling.max_new_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a sequence, computed in one step."""

    sequence: SequenceState
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether the step yields this sequence's next token."""
        return self.end >= self.sequence.prompt_length


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step and the whole engine may hold."""

    sequences: int
    """Running at once."""
    prefill_tokens: int
    """Prompt tokens a step; a longer prompt is computed in chunks of this many."""
    visual_tokens: int
    """Encoded and not yet prefilled; a larger image runs alone."""


class Scheduler:
    """Waiting and running sequences. `reserve` asks the device's cache for room; None means not now."""

    def __init__(
        self, limits: Limits, reserve: Callable[[SequenceState], Any], release: Callable[[Any], None]
    ) -> None:
        self.limits = limits
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self._reserve, self._release = reserve, release
        self._slots = list(range(limits.sequences))

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, sequence: SequenceState) -> None:
        self.waiting.append(sequence)

    def admit(self) -> Iterator[SequenceState]:
        """Moves waiting sequences into the cache while they fit; yields those that do not fit even alone.

        Strictly first come, first served: letting a small request pass a large one that waits for room would
        starve it.
        """
        pending = sum(len(sequence.placeholders) for sequence in self.running if not sequence.decoding)
        while self.waiting and len(self.running) < self.limits.sequences:
            head = self.waiting[0]
            visual = len(head.placeholders)
            if pending and pending + visual > self.limits.visual_tokens:
                return
            head.reservation = self._reserve(head)
            if head.reservation is not None:
                head.slot = self._slots.pop()
                self.running.append(self.waiting.popleft())
                pending += visual
            elif self.running:
                return
            else:
                yield self.waiting.popleft()

    def plan(self) -> list[Chunk]:
        """The next step: decoding sequences first, then prompts, in order of arrival."""
        chunks = [
            Chunk(sequence, sequence.computed, 1)
            for sequence in self.running
            if sequence.decoding and not sequence.complete
        ]
        # Decoding tokens count too, so that full steps have one size; but never more than half of it.
        limit = self.limits.prefill_tokens
        whole = budget = max(limit - len(chunks), -(-limit // 2))
        for sequence in self.running:
            if sequence.decoding or sequence.prefix_source is not None:
                continue
            left = sequence.prompt_length - sequence.computed
            # A prompt that fits into a step is not split over two: the second part would have to attend to the first,
            # and no work is saved. A longer one fills what is left of this step.
            if budget < left <= whole:
                break
            chunks.append(Chunk(sequence, sequence.computed, min(left, budget)))
            budget -= min(left, budget)
            if budget <= 0:
                break
        return sorted(chunks, key=lambda chunk: chunk.length > 1)  # decoding and all that looks like it first

    def drop_cancelled(self) -> None:
        """Takes out what nobody listens to any more."""
        for sequence in [sequence for sequence in self.running if sequence.cancelled]:
            self.remove(sequence)
        if any(sequence.cancelled for sequence in self.waiting):
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.cancelled)

    def remove(self, sequence: SequenceState) -> None:
        """Takes a finished, failed or abandoned sequence out, and gives its room back."""
        self.running.remove(sequence)
        self._release(sequence.reservation)
        self._slots.append(sequence.slot)
        sequence.reservation = sequence.features = None
