"""Records of parts that are lost on their way to the driver, come twice, or tell of other captions than the file.

A whole run with a real ledger, lease and session. Only the cluster is not there: a function takes its place that
publishes blocks and returns their records as actors do, or fails to.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.schema import RESULT_SCHEMA
from examples.toy.dataset import write_dataset
from pipeline import dataflow
from pipeline.input.shards import Shard
from pipeline.input.source import ShardWork
from pipeline.ledger.ledger import JOURNAL, Ledger
from pipeline.ledger.state import Published
from pipeline.run import graph
from pipeline.run.outcome import Outcome
from pipeline.run.progress import Progress
from pipeline.run.sealing import Sealed, seal
from pipeline.run.session import Session
from pipeline.spec.job_spec import JobSpec, load_spec
from pipeline.storage.files import FileInfo
from pipeline.storage.storage import Storage
from tests.checkpoints import untrained
from tests.commands import settings

Told = Callable[[tuple[Published, ...]], Sequence[Published]]
"""What reaches the driver of the records of a block."""


class Quiet:
    """A display that shows nothing."""

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(self, *_: object) -> None: ...
    def phase(self, text: str, detail: str = "") -> None: ...
    def note(self, text: str) -> None: ...
    def update(self, progress: Progress) -> None: ...


def captioned(work: ShardWork, kept: pa.Schema, rows: range, failed: bool = False) -> pa.Table:
    """What Generate makes of some rows of a shard."""
    table = pq.read_table(work.shard.url, columns=kept.names).slice(rows.start, len(rows)).cast(kept)
    error = {"kind": "oom", "stage": "generate", "message": "no memory"}
    lines = [
        (work.shard.name, row, work.shard.fingerprint)
        + ((None, "error", 9, 4, 0, error) if failed else (f"caption {row}", "stop", 9, 4, 2, None))
        for row in rows
    ]
    schema = pa.schema(
        [("_shard", pa.string()), ("_row", pa.int64()), ("_fingerprint", pa.string()), *RESULT_SCHEMA]
    )
    for field, values in zip(schema, zip(*lines, strict=True), strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return table


def run(
    monkeypatch: pytest.MonkeyPatch, spec: JobSpec, told: Told, again: bool = False
) -> tuple[Outcome, list[Progress]]:
    """`tessera run` on a cluster that captions blocks of four rows; `again`: each block first fails, is published
    and forgotten, and is then tried again."""
    looks: list[Progress] = []

    def drive(
        spec: JobSpec,
        session: Session,
        work: Sequence[ShardWork],
        kept: pa.Schema,
        folder: str,
        look: Callable[[Sequence[Published]], Progress],
    ) -> None:
        for item in work:
            for first, last in item.rows.ranges:
                for start in range(first, last, 4):
                    rows = range(start, min(start + 4, last))
                    if again:
                        session.ledger.publish(captioned(item, kept, rows, failed=True), folder)
                    looks.append(look(told(session.ledger.publish(captioned(item, kept, rows), folder))))
        looks.append(look([]))

    def at_once(ledger: Ledger, kept: pa.Schema) -> Callable[[Shard], Future[Sealed]]:
        def start(shard: Shard) -> Future[Sealed]:
            future: Future[Sealed] = Future()
            future.set_result(seal(ledger, kept, shard))
            return future

        return start

    monkeypatch.setattr(graph, "drive", drive)
    monkeypatch.setattr(graph, "remote_sealing", at_once)
    monkeypatch.setattr(dataflow, "_check_checkpoint", lambda *_: None)
    return dataflow.run(spec, Quiet()), looks


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    write_dataset(tmp_path / "in", rows=36, shards=3, seed=1)
    fields = {
        "input__path": tmp_path / "in",
        "output__path": tmp_path / "out",
        "model__path": untrained("llava_onevision"),
    }
    return load_spec(
        "examples/llava_onevision.yaml", [each.removeprefix("--set=") for each in settings(**fields)]
    )


def sound(spec: JobSpec, outcome: Outcome) -> None:
    """Every row has its caption, nothing is left over, and the output says that it is complete."""
    assert (outcome.rows, outcome.errors, outcome.captioned) == (36, 0, 36)
    out = Path(spec.output.path)
    assert pq.read_table(out / "data")["caption"].null_count == 0
    assert (out / "_SUCCESS").exists() and not (out / JOURNAL).exists()


def test_the_driver_looks_at_no_file_while_records_come(
    monkeypatch: pytest.MonkeyPatch, spec: JobSpec
) -> None:
    listed: list[str] = []
    list_files = Storage.list

    def counted(self: Storage, prefix: str = "") -> list[FileInfo]:
        listed.append(prefix)
        return list_files(self, prefix)

    def told(parts: tuple[Published, ...]) -> Sequence[Published]:
        during.extend(listed)
        listed.clear()
        return parts

    during: list[str] = []
    monkeypatch.setattr(Storage, "list", counted)
    outcome, looks = run(monkeypatch, spec, told)
    sound(spec, outcome)
    before = during.index(f"{JOURNAL}/part-00000.parquet")  # what a run begins with
    assert set(during[before:]) <= {f"{JOURNAL}/part-{number:05}.parquet" for number in range(3)}
    assert [look.done for look in looks] == [*range(4, 37, 4), 36]


def test_a_record_that_never_came_is_found_in_the_files(
    monkeypatch: pytest.MonkeyPatch, spec: JobSpec
) -> None:
    """An actor was killed after its put: of a whole shard, and of one block of another."""
    lost = {("part-00000.parquet", row) for row in (0, 4, 8)} | {("part-00001.parquet", 4)}

    def told(parts: tuple[Published, ...]) -> Sequence[Published]:
        ((name, entry),) = parts[0].entries.items()
        return () if (name, entry.rows.ranges[0][0]) in lost else parts

    outcome, looks = run(monkeypatch, spec, told)
    assert looks[-1].done == 20
    sound(spec, outcome)


def test_a_block_that_is_tried_again_is_counted_once_and_its_captions_win(
    monkeypatch: pytest.MonkeyPatch, spec: JobSpec
) -> None:
    """Each record comes twice; and each block was published before, otherwise, by an actor that then died."""
    outcome, looks = run(monkeypatch, spec, lambda parts: (*parts, *parts), again=True)
    assert looks[-1].done == looks[-1].succeeded == 36 and looks[-1].errors == 0
    sound(spec, outcome)


def test_a_resume_with_nothing_left_to_caption_seals_all_that_is_complete(
    monkeypatch: pytest.MonkeyPatch, spec: JobSpec
) -> None:
    """The driver died before it began to seal. What is left needs no cluster."""

    def no_sealing(*_: object) -> Callable[[Shard], Future[Sealed]]:
        raise RuntimeError("the driver died")

    def killed(parts: tuple[Published, ...]) -> Sequence[Published]:
        return ()

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "seal", no_sealing)
        with pytest.raises(RuntimeError, match="the driver died"):
            run(patch, spec, killed)
    monkeypatch.setattr(dataflow._Job, "drive", None)
    outcome = dataflow.run(spec, Quiet())
    assert (outcome.rows, outcome.captioned) == (36, 0) and not Path(spec.output.path, JOURNAL).exists()
