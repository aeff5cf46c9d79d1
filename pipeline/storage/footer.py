"""Parquet footers: everything planning needs to know of a file, in one small ranged read.

Why: a job over 10,000 shards plans from 10,000 footers, never from the data. One GET of a file's last
64 KiB nearly always holds the whole footer; opening the file the ordinary way costs a HEAD and megabytes of
readahead.
"""

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.files import read_range

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TAIL_BYTES = 64 * 1024


class NotParquetError(ValueError):
    """The file is no parquet file (or is cut off)."""


def read_footer(filesystem: "AbstractFileSystem", path: str, size: int) -> pq.FileMetaData:
    """The metadata of a parquet file of `size` bytes; raises NotParquetError or OSError."""
    return parse_footer(read_tail(filesystem, path, size))


def read_tail(filesystem: "AbstractFileSystem", path: str, size: int) -> bytes:
    """The last bytes of a parquet file of `size` bytes: its footer, the footer's length and a mark; raises as
    above."""
    if not size:
        raise NotParquetError("is empty (0 bytes)")
    tail = read_range(filesystem, path, max(0, size - TAIL_BYTES), size)
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        raise NotParquetError("is not a parquet file, or is cut off")
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if needed > size:
        raise NotParquetError("is a damaged parquet file")
    if needed > len(tail):
        tail = read_range(filesystem, path, size - needed, size)
    return tail[-needed:]


def tail_of(data: bytes | memoryview) -> bytes:
    """The same of a parquet file in memory."""
    return bytes(data[-int.from_bytes(data[-8:-4], "little") - 8 :])


def parse_footer(tail: bytes) -> pq.FileMetaData:
    """The metadata that `tail` is; raises NotParquetError."""
    try:
        footer = pq.read_metadata(pa.BufferReader(tail))
        groups = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise NotParquetError(f"has a damaged parquet footer ({one_line(error)})") from None
    if footer.num_rows != sum(groups) or min(groups, default=0) < 0:
        raise NotParquetError(
            f"has a damaged parquet footer ({footer.num_rows:,} rows, and {sum(groups):,} in its row groups)"
        )
    return footer


def one_line(error: BaseException) -> str:
    """What pyarrow says, which may take several lines, as part of a sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
