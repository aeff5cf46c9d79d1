"""Amending sealed shards: which rows failed, and their second results put in the place of the first.

Why: an image host was down, or a limit was too low. Those rows deserve another try; the millions of good ones beside
them must not be touched.

A retry is a journal of its own. Its parts lie under `_tessera/retry` until they are merged: the sealed file is read,
its error rows are replaced by what the parts hold, every other row is taken as it is, and the whole is swapped for the
very file that was read. Merging twice gives the same file, so a kill anywhere costs nothing: whoever comes next merges
what is left, and only then deletes the parts. A part is named after its content, so what is deleted is what was merged,
and never what another run published since. A shard without such rows is not even opened.
"""

from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.schema import ERROR, ROW
from pipeline.input.rows import RowSet
from pipeline.input.shards import Shard, output_name
from pipeline.ledger.ledger import DATA, RETRY, Ledger
from pipeline.ledger.merge import Sealed, damage_told, opened, part_rows, sealed_file, winning_rows
from pipeline.storage.files import in_parallel


def failed_rows(
    ledger: Ledger, shards: Sequence[Shard], kinds: Collection[str]
) -> list[tuple[Shard, RowSet]]:
    """The rows of sealed shards whose error is one of `kinds`, by shard; shards without any are left out.

    Footers say which shards have some; of those, and only those, the error column is read.
    """
    scan = ledger.scan()
    sealed = ((shard, scan.seal_of(shard.name, shard.fingerprint)) for shard in shards)
    concerned = [shard for shard, seal in sealed if seal and set(seal.stats.errors) & set(kinds)]

    def rows_of(shard: Shard) -> RowSet:
        with ledger.storage.open(f"{DATA}/{output_name(shard.name)}") as file:
            kind = pc.struct_field(pq.ParquetFile(file).read(columns=[ERROR])[ERROR], "kind")
        chosen = pc.is_in(kind, pa.array(sorted(kinds)), skip_nulls=True)
        return RowSet.of(np.flatnonzero(chosen.to_numpy()))

    return list(zip(concerned, in_parallel(rows_of, concerned), strict=True))


def merge_retried(ledger: Ledger) -> list[str]:
    """Merges every part of a retry into its sealed shards, deletes the parts, and returns the shards' names.

    Those of shards that this job does not read are merged too: another one, of more of the input, may have been killed.
    Rows of a version that is not sealed are of no use any more.
    """
    parts = ledger.retried()
    if not parts:
        return []
    scan = ledger.scan()
    concerned: dict[str, tuple[Sealed, list[str]]] = {}
    for part in sorted(parts, key=lambda part: part.path):
        for name, entry in part.entries.items():
            if seal := scan.seal_of(name, entry.fingerprint):
                sealed = Sealed(name, entry.fingerprint, seal.stats.rows)
                concerned.setdefault(name, (sealed, []))[1].append(part.path)
    in_parallel(lambda item: _amend(ledger, *item), list(concerned.values()))
    ledger.storage.delete([part.path for part in parts])
    ledger.storage.delete_empty_folders(RETRY)
    return sorted(concerned)


def _amend(ledger: Ledger, shard: Sealed, parts: Sequence[str]) -> None:
    path = f"{DATA}/{output_name(shard.name)}"
    while True:
        data, version = ledger.storage.read_version(path)
        sealed = opened(pa.BufferReader(data))
        with damage_told(path):
            before = _row_groups(sealed)
        retried = [part_rows(part, ledger.storage.read(part), shard, sealed.schema_arrow) for part in parts]
        amended, _ = sealed_file(shard, *_replaced(before, retried))
        if amended == data or ledger.storage.put_if(path, amended, version):
            return


def _row_groups(sealed: pq.ParquetFile) -> list[pa.Table]:
    """The rows of a sealed file as `_row` and its columns, a table for each row group."""
    tables: list[pa.Table] = []
    start = 0
    for group in range(sealed.num_row_groups):
        table = sealed.read_row_group(group, use_threads=False).replace_schema_metadata(None)
        rows = pa.array(np.arange(start, start + table.num_rows))
        tables.append(table.add_column(0, pa.field(ROW, pa.int64()), rows))
        start += table.num_rows
    return tables


def _replaced(
    before: Sequence[pa.Table], retried: Sequence[pa.Table]
) -> tuple[Sequence[pa.Table], np.ndarray]:
    """The arguments of `sealed_file`: `before` with its error rows replaced where `retried` holds them."""
    rows = np.concatenate([table[ROW].to_numpy() for table in retried])
    was_error = np.concatenate([pc.is_valid(table[ERROR]).to_numpy() for table in before])
    chosen = winning_rows(retried)
    chosen = chosen[was_error[rows[chosen]]]
    places = np.arange(len(was_error))
    places[rows[chosen]] = len(was_error) + chosen
    return [*before, *retried], places
