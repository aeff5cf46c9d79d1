"""The stages as a run wants them: they drain when it stops, and captions are published where they are made.

Generate publishes its own block. What waits to be written dies with the driver or a node, so it does not
wait: a kill costs the blocks in the engine, and no queue behind it. The same captions, made again, have the same name
and replace themselves (ledger.py). While one block is being put, others keep the engine full. What leaves the pipeline
is no caption but a report of each block, from which the driver knows how far the job is.

Once the run stops, blocks that a stage has not begun are emptied. An empty block costs nothing, so the pipeline runs
dry by itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from actors.attempts import Attempts
from actors.engine.types import EngineRecord
from actors.generate import Generate, GenerateConfig
from actors.preprocess import Preprocess, PreprocessConfig
from pipeline.ledger import entries
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.state import Published
from pipeline.run import engines
from pipeline.run.failing import example_of
from pipeline.storage.lease import Fence
from pipeline.storage.retrying import RETRIES

_REPORT = "report"  # the one column of what leaves the pipeline: JSON

_NICENESS = 4  # Ray starts its workers at 15, and 19 yields most


@dataclass(frozen=True, slots=True)
class Report:
    """What the driver is told of a block: the parts that hold its rows, one of its error rows in words, and how often
    its process tried storage again since the last. The first of an actor tells of its engine, too."""

    parts: tuple[Published, ...]
    example: str
    storage_retries: int
    engine: EngineRecord | None = None

    def to_block(self) -> pa.Table:
        parts = [(part.path, part.rows, entries.to_plain(part.entries)) for part in self.parts]
        engine = engines.to_plain(self.engine) if self.engine else None
        return pa.table({_REPORT: [json.dumps([parts, self.example, self.storage_retries, engine])]})


def reports_in(block: pa.Table) -> Iterator[Report]:
    """The inverse of `Report.to_block`, of one or several."""
    for data in block[_REPORT].to_pylist():
        parts, example, storage_retries, engine = json.loads(data)
        published = tuple(Published(path, rows, entries.from_plain(plain)) for path, rows, plain in parts)
        yield Report(published, example, storage_retries, engines.from_plain(engine) if engine else None)


class DrainingPreprocess(Preprocess):
    def __init__(self, fence: Fence, config: PreprocessConfig, attempts: Attempts) -> None:
        # Without a GPU both stages want the same cores. An engine's threads wait for each other, so whoever takes a
        # core from one of them holds up all; preprocessing is ahead of the engine anyway.
        os.nice(_NICENESS)
        super().__init__(config, attempts)
        self._fence = fence

    def __call__(self, block: pa.Table) -> pa.Table:
        return super().__call__(block.slice(0, 0) if self._fence.stopping() else block)


class PublishingGenerate(Generate):
    """`folder` is where in `ledger` its parts go."""

    def __init__(
        self, fence: Fence, config: GenerateConfig, attempts: Attempts, ledger: Ledger, folder: str
    ) -> None:
        super().__init__(config, attempts)
        self._fence, self._ledger, self._folder = fence, ledger, folder
        self._untold = iter((self.engine.record,))  # taken once, whichever of the concurrent calls ends first

    def __call__(self, block: pa.Table) -> pa.Table:
        captions = super().__call__(block.slice(0, 0) if self._fence.stopping() else block)
        parts: tuple[Published, ...] = ()
        if captions.num_rows:
            with self._guard.beside():  # a process killed in here must not incriminate another block's row
                parts = self._ledger.publish(captions, self._folder)
        return Report(parts, example_of(captions), RETRIES.take(), next(self._untold, None)).to_block()
