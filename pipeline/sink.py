"""The Ray Data sink: a block of captions becomes a journal part.

A write task publishes each block it is given by one atomic put under a name derived from the rows in it, so a
task that Ray retries replaces its own part and never adds a second one. Nothing is committed at the end: the
parts themselves say what is done.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
from ray.data import Datasink
from ray.data.block import BlockAccessor
from ray.data.datasource.datasink import WriteResult

from pipeline.ledger import JOURNAL, Ledger
from pipeline.weather import RETRIES


class JournalSink(Datasink[int]):
    """Publishes blocks as parts in a folder of `ledger`.

    A write returns how often its process has tried storage again since it last said so, in reading tasks too;
    `storage_retries` is their sum, once all are done.
    """

    def __init__(self, ledger: Ledger, folder: str = JOURNAL) -> None:
        self.ledger, self.folder = ledger, folder
        self.storage_retries = 0

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        """Nothing to prepare: the ledger's folders appear with their first file."""

    def write(self, blocks: Iterable[pa.Table], ctx: object) -> int:
        for table in (BlockAccessor.for_block(block).to_arrow() for block in blocks):
            if table.num_rows:
                self.ledger.publish(table, self.folder)
        return RETRIES.take()

    def on_write_complete(self, write_result: WriteResult[int]) -> None:
        self.storage_retries = int(sum(write_result.write_returns))  # Ray makes numpy numbers of them
