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

from pipeline.ledger import Ledger


class JournalSink(Datasink[list[str]]):
    """Publishes blocks into `ledger`'s journal; a write returns the names of its parts."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        """Nothing to prepare: the ledger's folders appear with their first file."""

    def write(self, blocks: Iterable[pa.Table], ctx: object) -> list[str]:
        tables = (BlockAccessor.for_block(block).to_arrow() for block in blocks)
        return [self.ledger.publish(table) for table in tables if table.num_rows]
