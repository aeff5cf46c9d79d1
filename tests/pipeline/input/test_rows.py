"""Row sets obey the laws of sets, and stay in normal form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.input.rows import RowSet

ROWS = st.frozensets(st.integers(0, 60))


def as_set(rows: RowSet) -> set[int]:
    found = rows.indices()
    assert found == sorted(set(found))
    assert rows == RowSet.of(found)  # normal form: equal sets are equal values
    assert len(rows) == len(found)
    assert bool(rows) == bool(found)
    return set(found)


@given(ROWS, ROWS)
def test_set_algebra(a: frozenset[int], b: frozenset[int]) -> None:
    left, right = RowSet.of(a), RowSet.of(b)
    assert as_set(left | right) == a | b
    assert as_set(left & right) == a & b
    assert as_set(left - right) == a - b
    assert RowSet.union_of([left, right, left]) == left | right


@given(ROWS, st.integers(0, 70), st.integers(0, 70))
def test_complement_and_within(a: frozenset[int], start: int, stop: int) -> None:
    rows = RowSet.of(a)
    assert as_set(rows.complement(stop)) == set(range(stop)) - a
    assert as_set(rows.within(start, stop)) == {row for row in a if start <= row < stop}
    assert as_set(RowSet.span(stop)) == set(range(stop))


@given(ROWS)
def test_json_round_trip(a: frozenset[int]) -> None:
    assert RowSet.from_json(RowSet.of(a).to_json()) == RowSet.of(a)


@given(st.lists(st.integers(0, 60)))
def test_rows_in_any_order_with_repeats(rows: list[int]) -> None:
    assert as_set(RowSet.of(rows)) == set(rows)


@pytest.mark.parametrize(
    "pairs", [[[3, 3]], [[5, 2]], [[0, 2], [2, 4]], [[0, 5], [3, 9]], [[4, 5], [0, 1]], [[-1, 2]]]
)
def test_what_is_not_in_normal_form_is_refused(pairs: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="sorted, disjoint"):
        RowSet.from_json(pairs)


def test_shown_for_people() -> None:
    assert str(RowSet.of([0, 1, 5])) == "0-1, 5"
    assert str(RowSet.of(range(0, 40, 2))).endswith("14, ...")
