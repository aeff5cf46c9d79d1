"""Sampling: the next token of each row, from its logits and its own rules.

A row's draw depends on its logits, its seed and how many tokens it has, nothing else. The random
number comes from a counter-based hash of (seed, index), and picks a token by the inverse of the row's cumulative
distribution; so a text is the same whatever its neighbours in the batch. Order of operations is transformers':
repetition penalty, what the checkpoint forbids, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from actors.engine.checkpoint_rules import CheckpointRules
from actors.engine.scheduler import SequenceState
from actors.engine.types import Sampling

_MASK = (1 << 64) - 1
_NUCLEUS = 1024
"""Tokens looked at first for top-p: a full sort of a 256 k vocabulary is rarely needed."""


class Sampled(NamedTuple):
    """One token a row, and its log-probability under the model where any row asked for it."""

    token_ids: list[int]
    logprobs: list[float] | None


def sample(logits: Tensor, sequences: Sequence[SequenceState], rules: CheckpointRules) -> Sampled:
    """logits [R, V], one row a sequence -> its next token. One copy to the host."""
    rows = [sequence.request.sampling for sequence in sequences]
    logits = logits.float()
    scores = rules.apply(_penalize(logits, sequences, rows), sequences)
    chosen = scores.argmax(dim=-1)
    # Rows that truncate draw in another order than rows that do not: each kind by itself, or a row's number would pick
    # another token beside other neighbours.
    for truncates in (False, True):
        drawing = [i for i, row in enumerate(rows) if row.temperature > 0 and _truncates(row) == truncates]
        if drawing:
            index = torch.tensor(drawing, device=logits.device)
            uniform = [uniform_at(rows[i].seed, len(sequences[i].generated)) for i in drawing]
            chosen[index] = draw(scores[index], [rows[i] for i in drawing], uniform)
    if not any(row.logprobs for row in rows):
        return Sampled(chosen.tolist(), None)
    logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
    # Ids survive a float64 exactly, so both travel in one copy.
    both = torch.stack([chosen.double(), logprobs.double()]).tolist()
    return Sampled([int(token) for token in both[0]], both[1])


def uniform_at(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of the stream `seed`: SplitMix64 (Steele, Lea and Flood, 2014)."""
    state = (seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((state ^ (state >> 31)) >> 11) * 2.0**-53


def draw(scores: Tensor, rows: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """scores [R, V] float32 and one number in [0, 1) a row -> token ids int64 [R]. Either all rows truncate (top-k,
    top-p) or none does."""
    device, vocabulary = scores.device, scores.shape[1]
    temperature = torch.tensor([row.temperature for row in rows], device=device)
    scores = scores / temperature[:, None]
    number = torch.tensor(uniform, dtype=torch.float64, device=device)[:, None]
    if not _truncates(rows[0]):
        return _invert(scores.softmax(dim=-1), number)
    top_k = torch.tensor(
        [row.top_k if 0 < row.top_k < vocabulary else vocabulary for row in rows], device=device
    )
    top_p = torch.tensor([row.top_p for row in rows], device=device)
    width = min(vocabulary, max(_NUCLEUS, *(row.top_k for row in rows), 0))
    while True:
        best, ids = scores.topk(width, dim=-1)
        rank = torch.arange(width, device=device)
        kept = best.masked_fill(rank >= top_k[:, None], float("-inf"))
        # A row's total is over what top-k left it: over the whole vocabulary where it has no top-k.
        total = torch.where(top_k < vocabulary, kept.logsumexp(-1), scores.logsumexp(-1))
        probabilities = (kept - total[:, None]).exp()
        before = probabilities.double().cumsum(-1) - probabilities
        complete = (top_k <= width) | ((before[:, -1] + probabilities[:, -1]) >= top_p)
        if width == vocabulary or bool(complete.all()):
            break
        width = vocabulary
    # Kept are the fewest best tokens whose mass reaches top_p; the best one always is.
    beyond = (before >= top_p[:, None]) & (rank > 0) & (top_p < 1)[:, None]
    nucleus = probabilities.masked_fill(beyond, 0)
    return ids.gather(1, _invert(nucleus, number)[:, None])[:, 0]


def _truncates(row: Sampling) -> bool:
    return row.top_k > 0 or row.top_p < 1


def _invert(weights: Tensor, number: Tensor) -> Tensor:
    """weights [R, V] >= 0 and numbers [R, 1] in [0, 1) -> the index at which each row's cumulative weight passes
    that part of its sum."""
    cumulative = weights.double().cumsum(-1)
    index = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)[:, 0]
    return index.clamp_(max=weights.shape[1] - 1)


def _penalize(logits: Tensor, sequences: Sequence[SequenceState], rows: Sequence[Sampling]) -> Tensor:
    """transformers' repetition penalty: scores of ids already in the prompt (placeholders too) or the text are
    divided by it if positive, multiplied if negative."""
    penalized = [index for index, row in enumerate(rows) if row.repetition_penalty != 1]
    if not penalized:
        return logits
    for index in penalized:
        _note_seen(sequences[index], logits)
    at = torch.tensor(penalized, device=logits.device)
    seen = torch.stack(
        [sequence.seen for sequence in (sequences[i] for i in penalized) if sequence.seen is not None]
    )
    factor = torch.tensor([rows[index].repetition_penalty for index in penalized], device=logits.device)[
        :, None
    ]
    scores = logits[at]
    result = logits.clone()
    result[at] = torch.where(seen, torch.where(scores < 0, scores * factor, scores / factor), scores)
    return result


def _note_seen(sequence: SequenceState, logits: Tensor) -> None:
    if sequence.seen is None:
        sequence.seen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        ids = [*sequence.request.token_ids.tolist(), *sequence.generated]
        sequence.seen[torch.tensor(ids, device=logits.device)] = True
    elif sequence.generated:
        sequence.seen[sequence.generated[-1]] = True
