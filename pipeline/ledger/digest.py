"""Digests and sizes of rows: functions of the values alone, whatever their layout in memory or in a file.

Why: a sealed file must prove that it holds the very rows that were sealed, and must end its row groups at the same
rows however these were partitioned before. Arrow can lay out equal values in many ways (chunks, slices, unused bytes
behind a null, 32 or 64-bit offsets, a validity bitmap of ones or none); here equal values give equal answers.
"""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

DIGEST_ROWS = 1024  # rows of one digest: a shard of a million rows adds 20 KB to its footer


def row_digests(table: pa.Table) -> list[str]:
    """A digest (64 bits, hexadecimal) of each `DIGEST_ROWS` rows of a table, and of the rest."""
    return [_digest(table.slice(start, DIGEST_ROWS)).hex() for start in range(0, table.num_rows, DIGEST_ROWS)]


def row_sizes(table: pa.Table) -> np.ndarray:
    """Bytes of each row's values, int64 [rows]."""
    sizes = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        sizes += _sizes(_array(column))
    return sizes


def _digest(table: pa.Table) -> bytes:
    sha = sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        for buffer in (name.encode(), *_buffers(_array(column))):
            view = memoryview(buffer)
            sha.update(view.nbytes.to_bytes(8, "little"))  # so that no two sequences of buffers read alike
            sha.update(view)
    return sha.digest()[:8]


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _buffers(array: pa.Array) -> Iterator[Any]:
    """What tells an array from another of its type: which values are null, then the others, as buffers."""
    array = _plain(array)
    yield array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else b""
    array = array.drop_null()
    kind = array.type
    if pt.is_struct(kind):
        for field in array.flatten():
            yield from _buffers(field)
    elif _is_list(kind):
        yield _lengths(array)
        yield from _buffers(array.flatten())
    elif _is_binary(kind):
        yield _lengths(array)
        array = array.cast(pa.large_binary())
        _, offsets, data = array.buffers()
        if data:
            first, last = np.frombuffer(offsets, np.int64)[[array.offset, array.offset + len(array)]]
            yield data.slice(first, last - first)
    elif not pt.is_null(kind) and len(array):
        width = kind.bit_width // 8
        yield array.buffers()[1].slice(array.offset * width, len(array) * width)


def _sizes(array: pa.Array) -> np.ndarray:
    """Bytes of each value, int64; of a null, those of its fixed part."""
    array = _plain(array)
    kind = array.type
    if pt.is_struct(kind):
        return sum((_sizes(field) for field in array.flatten()), np.zeros(len(array), np.int64))
    if _is_list(kind):
        ends = np.cumsum(_lengths(array))
        totals = np.concatenate([[0], np.cumsum(_sizes(array.flatten()))])
        return totals[ends] - totals[ends - _lengths(array)]
    if _is_binary(kind):
        return _lengths(array)
    return np.full(len(array), 0 if pt.is_null(kind) else kind.bit_width // 8)


def _lengths(array: pa.Array) -> np.ndarray:
    """Elements of each list or bytes of each string, int64; nulls have none."""
    count = pc.list_value_length if _is_list(array.type) else pc.binary_length
    return count(array).fill_null(0).cast(pa.int64()).to_numpy()


def _plain(array: pa.Array) -> pa.Array:
    """The same values in a type that has buffers of its own: of extension types, maps and bits, what is beneath."""
    if isinstance(array.type, pa.BaseExtensionType):
        return _plain(array.storage)
    if pt.is_map(array.type):
        entries = pa.struct([("key", array.type.key_type), ("value", array.type.item_type)])
        return array.cast(pa.list_(entries))
    return array.cast(pa.uint8()) if pt.is_boolean(array.type) else array


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


def _is_binary(kind: pa.DataType) -> bool:
    tests = (pt.is_string, pt.is_binary, pt.is_large_string, pt.is_large_binary)
    return any(test(kind) for test in tests)
