"""Requests and completions: what goes into an engine and what comes out of it.

Every engine (`reference`, `continuous`) is an object with one method, so that the actor, the tests and the
benchmarks exchange them freely. Requests and completions carry a `key` of the caller's; order is not kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Protocol

import numpy as np

from actors.errors import RowError
from actors.families.base import ImageLayout

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: bool = False
    """Whether to report each token's log-probability (continuous engine only)."""


def row_seed(job_seed: int, shard: str, row: int) -> int:
    """A 63-bit seed from the job's seed and a row's identity, so that what is sampled for a row never depends
    on the batch, replica or run that row fell into."""
    digest = blake2b(f"{job_seed}/{shard}/{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One row, ready for the model.

    Attributes:
        key: The caller's name for it.
        token_ids: int32 [L], placeholder ids spliced in.
        pixels: uint8 [sum of tiles, *family.tile_shape]; no tiles for text alone.
        layouts: One a picture (image or video), in the order of the placeholders.
    """

    key: Hashable
    token_ids: np.ndarray
    pixels: np.ndarray
    layouts: tuple[ImageLayout, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Completion:
    """What a request became: text up to (not with) the end-of-sequence token or stop string, or an error.

    `logprobs`, where asked for, holds one natural logarithm a generated token: under the model itself, before
    temperature, penalties and truncation.
    """

    key: Hashable
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    error: RowError | None = None
    logprobs: tuple[float, ...] | None = None

    @property
    def logprob(self) -> float | None:
        """The log-probability of the whole generated sequence."""
        return None if self.logprobs is None else sum(self.logprobs)


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What an engine runs on and how, for a run's record: chosen when it is built, by what proved itself."""

    engine: str
    device: str
    """The processor's or GPU's name."""
    dtype: str
    threads: int
    attention: str = "stock"
    layers: str = "stock"
    experts: str = "none"
    graphs: str = "none"
    why: tuple[str, ...] = ()
    """What stood against each faster path, as in "attention: flash differed by 0.3 at 4 sequences"."""


class DeviceLost(RuntimeError):
    """The device failed for good (a CUDA fault): nothing can be computed in this process any more. Every caller of the
    engine gets it; the actor must end its process, so that another takes its place."""


class Engine(Protocol):
    """Generates for many requests; completions come as they finish. A request that fails becomes a completion
    with an error; an exception from `generate` means that the engine itself is broken."""

    @property
    def record(self) -> EngineRecord: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]: ...
