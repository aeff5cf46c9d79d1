"""Sets of rows of one shard, as ranges.

Why: what is done and what remains of a shard of a million rows must fit a footer and a driver's memory. Work
arrives in runs of neighbouring rows, so a few half-open ranges say it all.

A value in normal form. Ranges are sorted, disjoint and never touch, so equal sets are equal
objects, and union, difference and complement are one linear sweep each.

>>> done = RowSet.of([0, 1, 2, 7]) | RowSet.of([3])
>>> done.ranges, len(done), done.complement(10).to_json()
(((0, 4), (7, 8)), 5, [[4, 7], [8, 10]])
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True, slots=True)
class RowSet:
    """An immutable set of row indices >= 0. Build it with `of`, `span`, `union_of` or `from_json`."""

    ranges: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        end = -1
        for first, last in self.ranges:
            if not end < first < last:
                raise ValueError(f"ranges must be sorted, disjoint and not empty, found {self.ranges[:8]}")
            end = last

    @classmethod
    def of(cls, rows: Iterable[int]) -> "RowSet":
        """The set of these rows, in any order, repeats allowed."""
        return cls(_merged((row, row + 1) for row in sorted(map(int, rows))))

    @classmethod
    def span(cls, stop: int) -> "RowSet":
        """Rows 0 .. stop - 1."""
        return cls(((0, stop),) if stop > 0 else ())

    @classmethod
    def union_of(cls, sets: Iterable["RowSet"]) -> "RowSet":
        """The union of many sets in one pass, O(n log n) in ranges."""
        return cls(_merged(sorted(chain.from_iterable(rows.ranges for rows in sets))))

    @classmethod
    def from_json(cls, pairs: Sequence[Sequence[int]]) -> "RowSet":
        """The inverse of `to_json`; raises ValueError for pairs not in normal form."""
        return cls(tuple((int(first), int(last)) for first, last in pairs))

    def to_json(self) -> list[list[int]]:
        """[[first, last + 1], ...]"""
        return [[first, last] for first, last in self.ranges]

    def __len__(self) -> int:
        return sum(last - first for first, last in self.ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def indices(self) -> list[int]:
        """Every row, ascending."""
        return list(chain.from_iterable(range(first, last) for first, last in self.ranges))

    def within(self, start: int, stop: int) -> "RowSet":
        """The rows of the set in start .. stop - 1 (a row group, a batch)."""
        return self & RowSet(((start, stop),)) if start < stop else RowSet()

    def __or__(self, other: "RowSet") -> "RowSet":
        return RowSet.union_of((self, other))

    def __sub__(self, other: "RowSet") -> "RowSet":
        if not self.ranges or not other.ranges:
            return self
        return self & other.complement(self.ranges[-1][1])

    def __and__(self, other: "RowSet") -> "RowSet":
        left, right = self.ranges, other.ranges
        both: list[tuple[int, int]] = []
        i = j = 0
        while i < len(left) and j < len(right):
            first, last = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
            if first < last:
                both.append((first, last))
            if left[i][1] < right[j][1]:
                i += 1
            else:
                j += 1
        return RowSet(tuple(both))

    def complement(self, stop: int) -> "RowSet":
        """Rows 0 .. stop - 1 that are not in the set."""
        edges = [0, *chain.from_iterable(self.ranges), max(stop, self.ranges[-1][1] if self.ranges else 0)]
        gaps = ((first, min(last, stop)) for first, last in zip(edges[::2], edges[1::2], strict=True))
        return RowSet(tuple((first, last) for first, last in gaps if first < last))

    def __str__(self) -> str:
        """Short, for messages: at most eight ranges, last row included.

        >>> str(RowSet.of([1, 2, 3, 9]))
        '1-3, 9'
        """
        shown = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in self.ranges[:8]]
        return ", ".join(shown) + (", ..." if len(self.ranges) > 8 else "")


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted ranges, joined where they overlap or touch."""
    merged: list[tuple[int, int]] = []
    for first, last in ranges:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)
