"""Sampling: the next token of each row, from its logits and its own rules.

A row's draw depends on its logits, its seed and how many tokens it has, nothing else. The random
number comes from a counter-based hash of (seed, index), and picks a token by the inverse of the row's cumulative
distribution; so a text is the same whatever its neighbours in the batch. Order of operations is transformers':
repetition penalty, what the checkpoint forbids, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.engine.checkpoint_rules import CheckpointRules
from actors.engine.scheduler import SequenceState
from actors.engine.transfer import download, upload
from actors.engine.types import Sampling

_MASK = (1 << 64) - 1
_NUCLEUS = 1024
"""Tokens looked at first for top-p: a full sort of a 256 k vocabulary is rarely needed."""


class Tokens:
    """One token a row, and its log-probability under the model where any row asked for it, on their way to the host."""

    def __init__(self, token_ids: Tensor, logprobs: Tensor | None) -> None:
        # Ids survive a float64 exactly, so both travel in one copy.
        both = token_ids[None] if logprobs is None else torch.stack([token_ids.double(), logprobs.double()])
        self._arrived = download(both)

    def result(self) -> tuple[list[int], list[float] | None]:
        """Waits until they are there."""
        token_ids, *logprobs = self._arrived().tolist()
        return [int(token) for token in token_ids], logprobs[0] if logprobs else None


class Sampler:
    """Picks the next token of each row.

    `last` int64 [slots + 1] holds the last token of the sequence in each slot, on the device: the next step takes it
    from there, before the host knows it. The last slot is scratch.
    """

    def __init__(self, slots: int, rules: CheckpointRules, device: torch.device) -> None:
        self.last = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._rules = rules
        self._seen: Tensor | None = None

    def __call__(self, logits: Tensor, sequences: Sequence[SequenceState]) -> Tokens:
        """logits [R, V], one row a sequence -> its next token."""
        rows = [sequence.request.sampling for sequence in sequences]
        slots = self._upload([sequence.slot for sequence in sequences])
        logits = logits.float()
        scores = self._rules.apply(self._penalize(logits, sequences, slots), sequences)
        chosen = scores.argmax(dim=-1)
        # Rows that truncate draw in another order than rows that do not: each kind by itself, or a row's number would
        # pick another token beside other neighbours.
        for truncates in (False, True):
            drawing = [
                i for i, row in enumerate(rows) if row.temperature > 0 and _truncates(row) == truncates
            ]
            if drawing:
                index = self._upload(drawing)
                uniform = [uniform_at(rows[i].seed, sequences[i].sampled) for i in drawing]
                chosen[index] = draw(scores[index], [rows[i] for i in drawing], uniform)
        self.last.index_copy_(0, slots, chosen)
        if not any(row.logprobs for row in rows):
            return Tokens(chosen, None)
        return Tokens(chosen, logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1))

    def _penalize(self, logits: Tensor, sequences: Sequence[SequenceState], slots: Tensor) -> Tensor:
        """transformers' repetition penalty: scores of ids already in the prompt (placeholders too) or the text are
        divided by it if positive, multiplied if negative."""
        penalties = [sequence.request.sampling.repetition_penalty for sequence in sequences]
        penalized = [index for index, penalty in enumerate(penalties) if penalty != 1]
        if not penalized:
            return logits
        if self._seen is None:
            shape = len(self.last), logits.shape[1]
            self._seen = torch.zeros(shape, dtype=torch.bool, device=logits.device)
        at = self._upload(penalized)
        slots = slots[at]
        for sequence in (sequences[index] for index in penalized):
            if not sequence.sampled:  # nothing of its own is in its slot yet
                self._seen[sequence.slot] = False
                self._seen[sequence.slot, self._upload(sequence.request.token_ids)] = True
                self.last[sequence.slot] = int(sequence.request.token_ids[-1])
        self._seen[slots, self.last[slots]] = True
        factor = self._upload([penalties[index] for index in penalized], np.float32)[:, None]
        scores = logits[at]
        penalized_scores = torch.where(scores < 0, scores * factor, scores / factor)
        result = logits.clone()
        result[at] = torch.where(self._seen[slots], penalized_scores, scores)
        return result

    def _upload(self, values: Any, dtype: Any = np.int64) -> Tensor:
        return upload(np.asarray(values, dtype), self.last.device)


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
    number = upload(np.array(uniform)[:, None], device)
    temperature, top_p = upload(
        np.array([(row.temperature, row.top_p) for row in rows], np.float32).T.copy(), device
    )
    scores = scores / temperature[:, None]
    if not _truncates(rows[0]):
        return _invert(scores.softmax(dim=-1), number)
    kept_ids = [row.top_k if 0 < row.top_k < vocabulary else vocabulary for row in rows]
    top_k = upload(np.array(kept_ids), device)
    width = min(vocabulary, max(_NUCLEUS, *(row.top_k for row in rows), 0))
    while True:
        best, ids = scores.topk(width, dim=-1)
        rank = torch.arange(width, device=device)
        kept = best.masked_fill(rank >= top_k[:, None], float("-inf"))
        # A row's total is over what top-k left it: over the whole vocabulary where it has no top-k.
        total = torch.where(top_k < vocabulary, kept.logsumexp(-1), scores.logsumexp(-1))
        probabilities = (kept - total[:, None]).exp()
        before = probabilities.double().cumsum(-1) - probabilities
        # Only top-p alone may need more: to know waits for the device.
        if width == vocabulary or all(ids <= width for ids in kept_ids):
            break
        complete = (top_k <= width) | ((before[:, -1] + probabilities[:, -1]) >= top_p)
        if bool(complete.all()):
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
