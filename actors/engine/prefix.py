"""Prefix caching: several prompts or samples on one image are encoded and prefilled once.

What a token leaves in the cache depends on what stands before it only, so sequences that begin alike, up
to the end of their last image, can take each other's keys and values. The first of them is the prefix
source; those that enter while it runs wait for its prefix, copy it and compute only what is their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

import numpy as np

from actors.engine.scheduler import SequenceState


def prefix_key(sequence: SequenceState) -> tuple[int, int, int] | None:
    """What sequences with the same prefix have in common; `same_prefix` has the last word. None without images."""
    if not sequence.prefix:
        return None
    request = sequence.request
    ids = np.ascontiguousarray(request.token_ids[: sequence.prefix])
    return sequence.prefix, crc32(ids.data), crc32(np.ascontiguousarray(request.pixels).data)


def same_prefix(one: SequenceState, other: SequenceState) -> bool:
    """Whether two sequences of equal key really begin alike: ids, layouts and every pixel."""
    a, b = one.request, other.request
    return (
        a.layouts == b.layouts
        and np.array_equal(a.token_ids[: one.prefix], b.token_ids[: other.prefix])
        and np.array_equal(a.pixels, b.pixels)
    )


def find_prefix_source(sequence: SequenceState, running: Iterable[SequenceState]) -> SequenceState | None:
    """A running sequence whose prefix `sequence` can take over; it computes, or has computed, it by itself."""
    if sequence.prefix_key is None:
        return None
    for other in running:
        computes_own = other is not sequence and other.prefix_source is None
        if computes_own and other.prefix_key == sequence.prefix_key and same_prefix(sequence, other):
            return other
    return None


def shared_tokens(sequence: SequenceState) -> int:
    """Tokens that `sequence` takes from its prefix source: at least one is left, for the logits to come from."""
    return min(sequence.prefix, sequence.prompt_length - 1)
