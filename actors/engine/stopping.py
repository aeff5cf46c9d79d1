"""Stop conditions: when a text is finished, by an end-of-sequence id, a stop string, or its length.

Only the tail of a text can complete a stop string, so each new token costs the decoding of a few
tokens, however long the text is; what the tail suggests is confirmed on the whole text, once.
"""

from __future__ import annotations

from actors.engine.types import Sampling
from actors.families.base import Family

_SLACK = 4
"""Tokens before the tail: the first ones of a window may decode differently (half a character, a leading space)."""


def stop_strings(family: Family, sampling: Sampling) -> tuple[str, ...]:
    """What ends a request's text: its own stop strings and the checkpoint's."""
    return (*sampling.stop, *family.stop_strings)


class Stopper:
    """Says after each token whether a text is finished; the same rules as the reference engine's."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._special = frozenset(family.tokenizer.all_special_ids)

    def finished(self, generated: list[int], sampling: Sampling) -> bool:
        if len(generated) >= sampling.max_new_tokens or generated[-1] in self.family.eos_token_ids:
            return True
        stops = stop_strings(self.family, sampling)
        if not stops:
            return False
        tail = self.family.decode(self._tail(generated, stops))
        if not any(stop in tail for stop in stops):
            return False
        text = self.family.decode(generated)
        return any(stop in text for stop in stops)

    def _tail(self, generated: list[int], stop: tuple[str, ...]) -> list[int]:
        """The last tokens that can hold a stop string: every token but the special ones, which are skipped, adds
        at least one byte."""
        need = max(len(string.encode()) for string in stop) + _SLACK
        tail: list[int] = []
        for token in reversed(generated):
            if token not in self._special:
                tail.append(token)
                if len(tail) == need:
                    break
        return tail[::-1]
