"""Digests and sizes of rows depend on the values and on nothing else."""

import datetime
import decimal
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ledger.digest import DIGEST_ROWS, row_digests, row_sizes

ROWS = 60


def some(value) -> list:
    """`value(i)` of each row, with a null here and there."""
    return [None if row % 7 == 3 else value(row) for row in range(ROWS)]


COLUMNS = {
    "text": pa.array(some(lambda n: "é" * (n % 5))),
    "bytes": pa.array(some(lambda n: b"x" * (n % 5)), pa.binary()),
    "words": pa.array(some(lambda n: [None, "a" * n][: n % 3])),
    "pairs": pa.array(some(lambda n: {"a": n if n % 2 else None, "b": [b"q"] * (n % 3)})),
    "map": pa.array(some(lambda n: [(f"k{n}", n)] * (n % 3)), pa.map_(pa.string(), pa.int32())),
    "two": pa.array(some(lambda n: [n, None]), pa.list_(pa.int32(), 2)),
    "bit": pa.array(some(lambda n: n % 2 == 0)),
    "nothing": pa.nulls(ROWS),
    "price": pa.array(some(decimal.Decimal)),
    "when": pa.array(some(lambda n: datetime.datetime(2026, 1, 1, 0, n)), pa.timestamp("us", "UTC")),
    "number": pa.array(some(lambda n: float("nan") if n % 3 else -0.0)),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array(some(lambda n: b"%016d" % n), pa.binary(16))),
}
TABLE = pa.table(COLUMNS)


def same(one: pa.Table, other: pa.Table) -> bool:
    return row_digests(one) == row_digests(other) and np.array_equal(row_sizes(one), row_sizes(other))


def layouts() -> dict[str, pa.Table]:
    file = io.BytesIO()
    pq.write_table(TABLE, file, row_group_size=17)
    backwards = np.arange(ROWS)[::-1]
    large = TABLE.set_column(0, "text", TABLE["text"].cast(pa.large_string()))
    return {
        "chunks": pa.concat_tables(TABLE.slice(start, 7) for start in range(0, ROWS, 7)),
        "a slice of more": pa.concat_tables([TABLE.slice(5, 9), TABLE]).combine_chunks().slice(9),
        "taken": TABLE.take(backwards).take(backwards),
        "through parquet": pq.read_table(file),
        "64-bit offsets": large.set_column(2, "words", large["words"].cast(pa.large_list(pa.string()))),
    }


@pytest.mark.parametrize("name", sorted(layouts()))
def test_the_layout_has_no_part_in_it(name: str) -> None:
    assert same(layouts()[name], TABLE)


def test_what_lies_behind_a_null_has_no_part_in_it() -> None:
    mask = np.array([False, True, False])
    arrays = [
        pa.array([1, 2, 3], mask=mask),
        pa.StringArray.from_buffers(
            3,
            pa.py_buffer(np.array([0, 1, 9, 10], np.int32)),
            pa.py_buffer(b"a--------b"),
            pa.py_buffer(b"\x05"),
        ),
        pa.ListArray.from_arrays([0, 1, 5, 6], pa.array([1, 9, 9, 9, 9, 2]), mask=pa.array(mask)),
        pa.StructArray.from_arrays([pa.array(["a", "--", "b"])], ["f"], mask=pa.array(mask)),
    ]
    for array in arrays:
        plain = pa.array(array.to_pylist(), array.type)
        assert same(pa.table({"x": array}), pa.table({"x": plain})), array.type


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "nothing"])
def test_every_kind_of_value_has_a_part_in_it(name: str) -> None:
    column = pa.table({name: COLUMNS[name]})
    other = np.arange(ROWS)
    other[1] = 2 if name != "number" else 0
    for changed in (other, np.where(np.arange(ROWS) == 1, 3, np.arange(ROWS))):  # a value, a null
        assert row_digests(column.take(changed)) != row_digests(column)


@given(st.lists(st.integers(0, 4), min_size=5, max_size=5))
def test_five_rows_read_alike_only_if_they_are(rows: list[int]) -> None:
    five = TABLE.slice(4, 5)
    assert (row_digests(five.take(rows)) == row_digests(five)) == (rows == [0, 1, 2, 3, 4])


def test_neighbours_do_not_run_together() -> None:
    tables = [
        {"x": ["ab", "c"]},
        {"x": ["a", "bc"]},
        {"x": ["abc", ""]},
        {"y": ["ab", "c"]},
        {"x": ["ab"], "y": ["c"]},
    ]
    assert len({tuple(row_digests(pa.table(table))) for table in tables}) == len(tables)


def test_a_digest_stands_for_so_many_rows() -> None:
    table = pa.table({"x": range(2 * DIGEST_ROWS + 1)})
    changed = pa.table({"x": [*range(DIGEST_ROWS), 0, *range(DIGEST_ROWS + 1, 2 * DIGEST_ROWS + 1)]})
    equal = [one == other for one, other in zip(row_digests(table), row_digests(changed), strict=True)]
    assert equal == [True, False, True]
    assert row_digests(table.slice(0, 0)) == []


def test_sizes_are_of_values() -> None:
    table = pa.table(
        {"text": ["a", "bcd", None], "words": [["ab", None], [], ["c"]], "n": pa.array([1, 2, None])}
    )
    assert row_sizes(table).tolist() == [1 + 2 + 8, 3 + 8, 1 + 8]
