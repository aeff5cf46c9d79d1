"""What leaves the pipeline: a report of each block, with the records of the parts that hold its rows."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from actors.engine.types import EngineRecord
from actors.generate import Generate
from pipeline.ledger.ledger import JOURNAL, RETRY, Ledger
from pipeline.run.graph import reads_at_once
from pipeline.run.stages import PublishingGenerate, Report, reports_in
from pipeline.spec.job_spec import GenerateResources, ResourcesSpec
from pipeline.storage.lease import Fence
from pipeline.storage.storage import Storage
from tests.pipeline.ledgers import captions, shard

ENGINE = EngineRecord("continuous", "a processor", "float32", 1, why=("attention: compiled was wrong",))
A, B = shard("a.parquet", 8), shard("b.parquet", 8)


class Unwatched:
    """Attempts that remember nothing (`Generate` itself is left out)."""

    def __getattr__(self, name: str) -> object:
        return lambda *_: SimpleNamespace(alone=False, quarantined={}, ticket=0)


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishingGenerate:
    """A stage without a model: blocks come captioned."""

    def init(self: Generate, *_: object) -> None:
        from actors.attempts import Guard

        self._guard = Guard(Unwatched())  # type: ignore[arg-type]
        self.engine = SimpleNamespace(record=ENGINE)

    monkeypatch.setattr(Generate, "__init__", init)
    monkeypatch.setattr(Generate, "__call__", lambda _, block: block)
    monkeypatch.setattr(Fence, "stopping", lambda _: (tmp_path / "stop").exists())
    fence = Fence(Storage(str(tmp_path)), "run")
    return PublishingGenerate(fence, None, None, Ledger(str(tmp_path)), JOURNAL)  # type: ignore[arg-type]


def report_of(block: pa.Table) -> Report:
    (report,) = reports_in(block)
    return report


def test_a_report_says_what_the_footer_says(generate: PublishingGenerate, tmp_path: Path) -> None:
    told = report_of(generate(captions(A.name, range(4), failed=[2])))
    assert told.parts == Ledger(str(tmp_path)).scan().parts
    assert (told.example, told.storage_retries) == ("a.parquet row 2: cut off", 0)


def test_a_block_of_two_shards_makes_a_part_in_each_ones_folder(
    generate: PublishingGenerate, tmp_path: Path
) -> None:
    mixed = pa.concat_tables([captions(B.name, [7]), captions(A.name, range(4)), captions(B.name, [0])])
    told = report_of(generate(mixed))
    assert [part.path.rpartition("/")[0] for part in told.parts] == [
        f"{JOURNAL}/{one.name}" for one in (A, B)
    ]
    assert told.parts == Ledger(str(tmp_path)).scan().parts and told.example == ""
    (again,) = Ledger(str(tmp_path)).publish(captions(A.name, range(4)), RETRY)
    assert again.path.removeprefix(RETRY) == told.parts[0].path.removeprefix(JOURNAL)


def test_a_block_that_a_stopping_run_empties_is_reported_too(
    generate: PublishingGenerate, tmp_path: Path
) -> None:
    (tmp_path / "stop").touch()
    assert report_of(generate(captions(A.name, range(4)))).parts == ()
    assert Ledger(str(tmp_path)).scan().parts == ()


def test_an_actor_tells_of_its_engine_with_its_first_block(generate: PublishingGenerate) -> None:
    told = [report_of(generate(captions(A.name, [row]))).engine for row in range(3)]
    assert told == [ENGINE, None, None]


@pytest.mark.parametrize(("replicas", "reads"), [(1, 8), (32, 8), (512, 128)])
def test_no_more_shards_are_open_than_the_replicas_need(replicas: int, reads: int) -> None:
    assert reads_at_once(ResourcesSpec(generate=GenerateResources(replicas=(1, replicas)))) == reads
