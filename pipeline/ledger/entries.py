"""What a published file says of itself: which rows of which shards it holds, and what became of them.

Why: nothing beside the data may say that a row is done. So each journal part and each sealed shard carries
its own record in its parquet footer, under the key `tessera`, as JSON:

    {"digest": "5a..", "format": 4, "pages": 4711, "shards":
        {"a.parquet": {"fingerprint": "0f..", "rows": [[0, 64]], "stats": {..}, "digests": [..]}}}

Statistics stand per shard, so that a part that spans a sealed and an open shard is never counted twice. A sealed
file has digests of its rows too (digest.py), for verification.

Parquet has checksums for pages (which are written, so that every reader can check them) and none for a footer. So the
record carries a digest of the whole footer, its own place in it taken as zeros, and where the pages end; and a file
counts only if pages and footer fill it to the byte. (Arrow's own sums over column chunks end the process where a footer
is damaged, by an exception that nobody catches in C++.)
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.schema import ERROR, FINGERPRINT, ROW, SHARD
from pipeline.input.rows import RowSet
from pipeline.storage.footer import parse_footer, tail_of

KEY = "tessera"
FORMAT = 4
_END = 8  # bytes of a parquet file behind its footer: the footer's length and a mark
_RECORD = b'{"digest":"'  # how a record begins; nothing behind it in a footer does
_NO_DIGEST = "0" * 16


@dataclass(frozen=True, slots=True)
class RowStats:
    """Sums over rows. `errors` counts error rows by kind."""

    rows: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    image_tokens: int = 0
    generated_tokens: int = 0

    @property
    def failed(self) -> int:
        """Error rows of every kind."""
        return sum(self.errors.values())

    @classmethod
    def of(cls, table: pa.Table) -> "RowStats":
        """The sums over a table with the result columns."""
        kinds = pc.struct_field(table[ERROR], "kind").filter(pc.is_valid(table[ERROR]))
        counts = {item["values"] or "unknown": item["counts"] for item in pc.value_counts(kinds).to_pylist()}
        tokens = (table[name] for name in ("prompt_tokens", "image_tokens", "generated_tokens"))
        return cls(table.num_rows, dict(sorted(counts.items())), *(pc.sum(c).as_py() or 0 for c in tokens))

    @classmethod
    def total(cls, parts: Iterable["RowStats"]) -> "RowStats":
        """The sum of many."""
        rows = prompt = image = generated = 0
        errors: Counter[str] = Counter()
        for part in parts:
            rows += part.rows
            errors.update(part.errors)
            prompt += part.prompt_tokens
            image += part.image_tokens
            generated += part.generated_tokens
        return cls(rows, dict(sorted(errors.items())), prompt, image, generated)


@dataclass(frozen=True, slots=True)
class Entry:
    """Some rows of one version of one shard. `digests`, of sealed files: `row_digests` of each row group in turn."""

    fingerprint: str
    rows: RowSet
    stats: RowStats
    digests: tuple[str, ...] = ()


def entries_of(table: pa.Table) -> dict[str, Entry]:
    """The entries of a table with identity and result columns, by shard name.

    Raises ValueError when a row lacks its identity, or one shard appears in two versions.
    """
    identity = table.select([SHARD, ROW, FINGERPRINT])
    if any(column.null_count for column in identity.columns):
        raise ValueError("every row needs its _shard, _row and _fingerprint")
    entries: dict[str, Entry] = {}
    for name in sorted(pc.unique(table[SHARD]).to_pylist()):
        part = table.filter(pc.equal(table[SHARD], name))
        fingerprints = pc.unique(part[FINGERPRINT]).to_pylist()
        if len(fingerprints) > 1:
            raise ValueError(f"rows of two versions of {name} in one table")
        entries[name] = Entry(fingerprints[0], RowSet.of(part[ROW].to_numpy()), RowStats.of(part))
    return entries


def to_plain(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The entries as JSON has them."""
    return {
        name: {
            "fingerprint": entry.fingerprint,
            "rows": entry.rows.to_json(),
            "stats": asdict(entry.stats),
            "digests": entry.digests,
        }
        for name, entry in entries.items()
    }


def from_plain(shards: Mapping[str, Any]) -> dict[str, Entry]:
    """The inverse of `to_plain`; raises ValueError, KeyError or TypeError."""
    return {
        name: Entry(
            item["fingerprint"],
            RowSet.from_json(item["rows"]),
            RowStats(**item["stats"]),
            tuple(item["digests"]),
        )
        for name, item in shards.items()
    }


def encode(entries: Mapping[str, Entry], pages: int) -> str:
    """The footer's JSON of a file whose pages end at the byte `pages`; equal entries give equal text."""
    record = {"format": FORMAT, "pages": pages, "digest": _NO_DIGEST, "shards": to_plain(entries)}
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def signed(file: io.BytesIO) -> bytes:
    """A written file with the digest of its footer in its record."""
    with file.getbuffer() as data:
        tail = tail_of(data)
        begin, end = _digest_in(tail)
        data[len(data) - len(tail) + begin : len(data) - len(tail) + end] = _digest(tail).encode()
    return file.getvalue()


def decode(tail: bytes, size: int) -> dict[str, Entry]:
    """The entries of a file of `size` bytes that ends with `tail` (`read_tail`); ValueError if it is not one of
    Tessera's, of another format, or damaged."""
    footer = parse_footer(tail)
    text = (footer.metadata or {}).get(KEY.encode())
    if text is None:
        raise ValueError("was not written by Tessera")
    record = json.loads(text)
    if record["format"] != FORMAT:
        raise ValueError(f"has format {record['format']}, and this Tessera reads format {FORMAT}")
    if record["digest"] != _digest(tail):
        raise ValueError("has a damaged footer: it is not the one that was written")
    whole = record["pages"] + footer.serialized_size + _END
    if size != whole:
        raise ValueError(f"is damaged: it has {size:,} bytes, and its pages and its footer {whole:,}")
    return from_plain(record["shards"])


def to_parquet(table: pa.Table, entries: Mapping[str, Entry], statistics: bool) -> bytes:
    """The table as zstd parquet with the entries in its footer; equal input gives equal bytes."""
    file = io.BytesIO()
    plain = table.replace_schema_metadata(None)
    with parquet_writer(file, plain.schema, statistics) as writer:
        if plain.num_rows:  # datasets fails on a row group of no rows, and reads a file of no row groups
            writer.write_table(plain)
        write_entries(writer, entries, file.tell())
    return signed(file)


def parquet_writer(file: BinaryIO, schema: pa.Schema, statistics: bool) -> pq.ParquetWriter:
    """How every parquet file of an output is encoded."""
    return pq.ParquetWriter(
        file, schema, compression="zstd", write_statistics=statistics, write_page_checksum=True
    )


def write_entries(writer: pq.ParquetWriter, entries: Mapping[str, Entry], pages: int) -> None:
    """Puts the entries into the footer of a file that is being written, and whose pages end at the byte `pages`."""
    writer.add_key_value_metadata({KEY: encode(entries, pages)})


def _digest(tail: bytes) -> str:
    begin, end = _digest_in(tail)
    return sha256(tail[:begin] + _NO_DIGEST.encode() + tail[end:]).hexdigest()[: len(_NO_DIGEST)]


def _digest_in(tail: bytes) -> tuple[int, int]:
    """Where in a footer its record's digest begins and ends."""
    begin = tail.rfind(_RECORD) + len(_RECORD)
    return begin, begin + len(_NO_DIGEST)
