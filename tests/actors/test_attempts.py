"""The guard around a stage's work: whole blocks, suspects one by one, quarantined rows marked."""

import threading
import time
from dataclasses import dataclass, field

import pyarrow as pa
import pytest

from actors.attempts import Guard, Isolate, Proceed, RowKey, Unwatched
from actors.engine import DeviceLost
from actors.generate import Generate
from actors.preprocess import Preprocess
from actors.schema import ERROR, FINGERPRINT, ROW, SHARD, error_value
from tests.blocks import generate_config, picture, preprocess_config, source_block
from tests.checkpoints import untrained


@dataclass
class Memory:
    """Rules as it is told, and writes down what it hears."""

    suspects: set[RowKey] = field(default_factory=set)
    quarantined: dict[RowKey, str] = field(default_factory=dict)
    heard: list[object] = field(default_factory=list)
    stage: str = "preprocess"

    def started(self) -> None:
        self.heard.append("started")

    def begin(self, rows, alone):
        if not alone and self.suspects & set(rows):
            return Isolate()
        self.heard.append(("begin", [row for _, row in rows], alone))
        return Proceed(
            len(self.heard),
            quarantined={row: self.quarantined[row] for row in rows if row in self.quarantined},
        )

    def done(self, ticket) -> None:
        self.heard.append("done")

    def settled(self, rows) -> None:
        self.heard.append("settled")

    def end_process(self, error):
        raise SystemExit(str(error))


def block(rows: int, first: int = 0) -> pa.Table:
    table = source_block([[b"x"]] * rows, id=[str(first + row) for row in range(rows)])
    return table.set_column(
        table.schema.get_field_index(ROW), ROW, pa.array(range(first, first + rows), pa.int64())
    )


def test_an_innocent_block_goes_whole():
    memory = Memory()
    guard = Guard(memory)
    assert guard.run(block(3), lambda table: table) == block(3)
    assert memory.heard == ["started", ("begin", [0, 1, 2], False), "done"]


def test_a_block_with_a_suspect_goes_row_by_row():
    memory = Memory(suspects={("a.parquet", 1)})
    sizes: list[int] = []

    def work(table: pa.Table) -> pa.Table:
        sizes.append(table.num_rows)
        return table

    result = Guard(memory).run(block(3), work)
    assert sizes == [1, 1, 1] and result.combine_chunks() == block(3)
    alone = [[("begin", [row], True), "done"] for row in range(3)]
    assert memory.heard == ["started", *alone[0], *alone[1], *alone[2], "settled"]


@pytest.mark.parametrize("suspects", [set(), {("a.parquet", 0)}])
def test_a_quarantined_row_is_an_error_row_and_is_not_tried(suspects):
    tried: list[str] = []

    def work(table: pa.Table) -> pa.Table:
        tried.extend(
            row
            for row, error in zip(table["id"].to_pylist(), table[ERROR].to_pylist(), strict=True)
            if not error
        )
        return table

    memory = Memory(suspects, {("a.parquet", 1): "kills its process"})
    result = Guard(memory).run(block(3), work)
    assert tried == ["0", "2"]
    assert result[ERROR].to_pylist() == [None, error_value("crash", "preprocess", "kills its process"), None]


def test_the_attempt_of_an_error_that_escapes_stays_open():
    memory = Memory()
    with pytest.raises(ZeroDivisionError):
        Guard(memory).run(block(1), lambda table: 1 / 0)
    assert "done" not in memory.heard


def test_nothing_runs_beside_a_row_that_is_tried_alone():
    memory = Memory(suspects={("a.parquet", 100)})
    guard = Guard(memory)
    lock = threading.Lock()
    running: set[tuple[int, ...]] = set()
    beside: list[object] = []

    def work(table: pa.Table) -> pa.Table:
        rows = tuple(table[ROW].to_pylist())
        with lock:
            if running and (rows[0] >= 100 or any(other[0] >= 100 for other in running)):
                beside.append((rows, set(running)))
            running.add(rows)
        time.sleep(0.002)
        with lock:
            running.remove(rows)
        return table

    def other_work() -> None:
        for _ in range(20):
            with guard.beside():
                work(block(1, 50))

    threads = [
        threading.Thread(target=guard.run, args=(block(4, first), work)) for first in (0, 10, 100, 20, 30, 40)
    ]
    threads.append(threading.Thread(target=other_work))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not beside and memory.heard.count("done") == 5 + 4


def test_preprocess_passes_a_quarantined_row_on():
    path = untrained("llava_onevision")
    rows = source_block([[picture()], [picture()]], id=["x", "y"], prompt=["Describe the image."] * 2)
    memory = Memory(quarantined={("a.parquet", 0): "kills its process"})
    result = Preprocess(preprocess_config(path), memory)(rows).to_pylist()
    assert result[0][ERROR]["kind"] == "crash" and result[0]["_pixels"] is None
    assert result[1][ERROR] is None and result[1]["_pixels"]


def test_a_lost_device_ends_the_process_and_the_attempt_stays_open(monkeypatch):
    path = untrained("llava_onevision")
    rows = source_block([[picture()]], id=["x"], prompt=["Describe the image."])
    prepared = Preprocess(preprocess_config(path))(rows)
    memory = Memory(stage="generate")
    generate = Generate(generate_config(path), memory)

    class Lost:
        def generate(self, requests):
            raise DeviceLost("CUDA error: device-side assert triggered")
            yield

    monkeypatch.setattr(generate, "engine", Lost())
    with pytest.raises(SystemExit, match="device-side assert"):
        generate(prepared)
    assert memory.heard == ["started", ("begin", [0], False)]


def test_without_a_memory_a_lost_device_is_the_callers():
    with pytest.raises(DeviceLost):
        Unwatched("generate").end_process(DeviceLost("gone"))
    assert block(1)[FINGERPRINT][0].as_py() and block(1)[SHARD][0].as_py() == "a.parquet"
