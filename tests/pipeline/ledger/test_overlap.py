"""output.path is never where the input lies, and never another dataset's output."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataflow import run
from pipeline.input.shards import Input, Shard, discover
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.overlap import (
    refuse_long_names,
    refuse_nested_names,
    refuse_other_dataset,
    refuse_overlap,
)
from pipeline.run.progress import Lines
from pipeline.spec.job_spec import JobSpec, SpecError, parse_spec
from pipeline.storage.storage import Storage
from tests.checkpoints import untrained
from tests.pipeline.ledgers import captions, run_to_the_end


def spec_of(inputs: str | Path | Sequence[str], output: str | Path) -> JobSpec:
    path = str(inputs) if isinstance(inputs, Path) else inputs
    return parse_spec({"input": {"path": path}, "model": {"path": "m"}, "output": {"path": str(output)}})


def write(path: Path, rows: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(rows), "image": [b"x"] * rows}), path)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("in/a.parquet", "in/sub/b.parquet", "made/data/c.parquet"):
        write(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ("in", "in"),
        ("in", "in/"),
        ("in", "./in/../in"),
        ("in", "link"),
        ("link/", "in"),
        ("in//", "in"),
        ("in/*.parquet", "in"),
        ("in/*/*.parquet", "in"),
        ("in/a.parquet", "in"),
        (["in/sub", "in/a.parquet"], "in/sub"),
        ("in", "in/sub"),  # its files would lie beside b.parquet
        ("made/data", "made"),
        ("made/**/*.parquet", "made"),
        (["in", "made/data/c.parquet"], "made"),
    ],
)
def test_an_output_where_the_input_lies_is_refused(root: Path, inputs: str | list[str], output: str) -> None:
    spec = spec_of(inputs, output)
    with pytest.raises(SpecError, match=r"output\.path: .* input\.path") as caught:
        refuse_overlap(spec, discover(spec.input))
    assert output in str(caught.value) and "folder of its own" in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ("in", "in/captions"),
        ("in/**/*.parquet", "in/captions"),
        ("in", "input"),
        ("in/sub", "."),
        ("made/data", "again"),
        ("made/data", "made/data/again"),
    ],
)
def test_an_output_beside_or_below_the_input_is_fine(root: Path, inputs: str, output: str) -> None:
    spec = spec_of(inputs, output)
    refuse_overlap(spec, discover(spec.input))


def test_buckets_are_compared_alike(s3_url: str, root: Path) -> None:
    Storage(s3_url).put_atomic("in/a.parquet", (root / "in/a.parquet").read_bytes())
    for output in (f"{s3_url}/in", f"{s3_url}/in/", f"{s3_url}//in//"):
        spec = spec_of(f"{s3_url}/in/", output)
        with pytest.raises(SpecError, match=r"output\.path"):
            refuse_overlap(spec, discover(spec.input))
    spec = spec_of(f"{s3_url}/in/", f"{s3_url}/inside/")
    refuse_overlap(spec, discover(spec.input))


@pytest.mark.parametrize(
    ("name", "output", "fits"),
    [
        ("k" * 200 + "/" + "l" * 247 + ".parquet", "out", True),
        ("l" * 248 + ".parquet", "out", False),
        ("k" * 800 + ".parquet", "s3://bucket/out", True),
        ("ü" * 480 + ".parquet", "s3://bucket/out", False),
        ("k" * 800 + ".parquet", "s3://bucket/" + "o" * 160, False),
        ("k" * 2000, "memory://out", True),
    ],
)
def test_names_too_long_for_the_output_are_refused(
    name: str, output: str, fits: bool, tmp_path: Path
) -> None:
    found = Input((Shard(name, f"s3://in/{name}", 1, "v", 1, pa.schema([])),))
    spec = spec_of("s3://in", output)
    if fits:
        refuse_long_names(spec, found)
        return
    with pytest.raises(SpecError, match=r"output\.path: .* shorten the shard's name") as caught:
        refuse_long_names(spec, found)
    assert name in str(caught.value)


@pytest.mark.parametrize("names", [("a.parquet", "a.parquet/b.parquet"), ("x/a", "x/a.parquet/y/b")])
def test_names_below_each_other_are_refused_on_a_disk(names: tuple[str, str]) -> None:
    shards = tuple(Shard(name, f"s3://in/{name}", 1, "v", 1, pa.schema([])) for name in names)
    refuse_nested_names(spec_of("s3://in", "s3://out"), Input(shards))
    refuse_nested_names(spec_of("s3://in", "out"), Input(shards[1:]))
    with pytest.raises(SpecError, match=r"output\.path: .* rename one of them") as caught:
        refuse_nested_names(spec_of("s3://in", "out"), Input(shards))
    assert all(shard.url in str(caught.value) for shard in shards)


def captioned(spec: JobSpec) -> Ledger:
    """The output of a job that is done, without its captions' being any."""
    ledger, shards = Ledger(spec.output.path), discover(spec.input).shards
    ledger.bind(spec)
    tables = [captions(shard.name, range(shard.rows), shard.fingerprint) for shard in shards]
    run_to_the_end(ledger, shards, tables)
    return ledger


def check(spec: JobSpec) -> None:
    refuse_other_dataset(spec, discover(spec.input), Ledger(spec.output.path))


def test_the_output_of_another_dataset_is_refused(root: Path) -> None:
    check(spec_of("in", "out"))  # there is nothing yet
    captioned(spec_of("in", "out"))
    write(root / "other/x.parquet")
    # Another file of the same name, whose captions would replace a.parquet's
    write(root / "same/a.parquet", rows=4)
    write(root / "same/sub/b.parquet", rows=4)
    for name, shard in (("other", "x.parquet"), ("same", "a.parquet")):
        with pytest.raises(SpecError, match=r"^output\.path: out holds captions of 2 shards") as caught:
            check(spec_of(name, "out"))
        assert f"input.path ({name})" in str(caught.value) and shard in str(caught.value)
        assert str(root / "in") in str(caught.value) and "new folder" in str(caught.value)


def test_what_is_in_the_journal_counts_as_well(root: Path) -> None:
    spec = spec_of("in", "out")
    ledger, shard = Ledger("out"), discover(spec.input).shards[0]
    ledger.bind(spec)
    ledger.publish(captions(shard.name, [0], shard.fingerprint))
    with pytest.raises(SpecError, match="1 shards"):
        check(spec_of("made/data", "out"))


def test_the_same_dataset_may_change_grow_and_be_named_otherwise(root: Path) -> None:
    captioned(spec_of("in", "out"))
    check(spec_of("link/", "out"))
    check(spec_of("in/**/*.parquet", "out"))  # other entries, and shards that are there
    write(root / "in/a.parquet", rows=7)
    (root / "in/sub/b.parquet").unlink()
    write(root / "in/tonight.parquet")
    check(spec_of("in", "out"))  # every shard is another one: the folder is the same


def test_an_output_that_another_dataset_took_since_the_first_look_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two first runs at once: while one reads its checkpoint, the other begins and ends."""
    for folder in ("ours", "theirs"):
        write(tmp_path / folder / "a.parquet")
    model = {"path": untrained("llava_onevision")}
    ours, theirs = (
        parse_spec(
            {
                "input": {"path": str(tmp_path / folder)},
                "model": model,
                "output": {"path": str(tmp_path / "out")},
            }
        )
        for folder in ("ours", "theirs")
    )
    monkeypatch.setattr("pipeline.dataflow.check_checkpoint", lambda *_: captioned(theirs))
    with pytest.raises(SpecError, match=f"holds captions of 1 shards .* from {tmp_path / 'theirs'}"):
        run(ours, Lines(io.StringIO()))
    recorded = json.loads((tmp_path / "out/_tessera/spec.json").read_text())
    assert recorded["spec"]["input"]["path"] == [str(tmp_path / "theirs")]
