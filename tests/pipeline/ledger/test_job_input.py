"""The input as its output knows it: names keep their root, touched shards their captions, and too much asks."""

import os
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.input.shards import Input, InputError
from pipeline.ledger.job_input import listed_input, recognised, refuse_recaption, remember
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.overlap import refuse_other_dataset
from pipeline.report.status import status
from pipeline.spec.job_spec import JobSpec, SpecError, parse_spec
from pipeline.storage.storage import Storage
from tests.pipeline.ledgers import captions, run_to_the_end


def spec_of(inputs: str | Sequence[str], **limits: float) -> JobSpec:
    sections = {"model": {"path": "m"}, "output": {"path": "out"}, "limits": limits}
    return parse_spec({"input": {"path": inputs}, **sections})


def write(path: str, rows: int = 10, first: int = 0) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(first, first + rows), "image": [b"x"] * rows}), path)


def captioned(inputs: str | Sequence[str], failed: Sequence[int] = ()) -> Input:
    """Does the job as far as the ledger is concerned, and returns its input."""
    spec, ledger = spec_of(inputs), Ledger("out")
    found = recognised(listed_input(spec, ledger), ledger)
    ledger.bind(spec, found.root)
    remember(found, ledger)
    tables = [captions(shard.name, range(shard.rows), shard.fingerprint, failed) for shard in found.shards]
    run_to_the_end(ledger, found.shards, tables)
    return found


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.parquet", "a/2.parquet", "a/sub/3.parquet", "b/4.parquet"):
        write(f"in/{name}")
    return tmp_path


def names(inputs: str | Sequence[str]) -> list[str]:
    return [shard.name for shard in listed_input(spec_of(inputs), Ledger("out")).shards]


def test_names_begin_where_they_began(root: Path) -> None:
    alone = ["1.parquet", "2.parquet", "sub/3.parquet"]
    assert names("in/a") == alone and captioned("in/a").root == str(root / "in/a")
    assert names("in/a/sub") == ["sub/3.parquet"]
    assert names(["in/a/sub/", "in/a/1.parquet"]) == ["1.parquet", "sub/3.parquet"]
    assert names("in/a/s*/*.parquet") == ["sub/3.parquet"]
    with pytest.raises(InputError, match=r"^input\.path: in/b lies outside of .*/in/a, .* output of its own"):
        names(["in/a", "in/b"])
    assert names("in") == ["a/1.parquet", "a/2.parquet", "a/sub/3.parquet", "b/4.parquet"]
    spec, ledger = spec_of("in"), Ledger("out")
    with pytest.raises(SpecError, match=r"set output\.path to a new folder"):
        refuse_other_dataset(spec, listed_input(spec, ledger), ledger)


def test_a_list_may_shrink_to_one_of_its_folders(root: Path) -> None:
    assert captioned(["in/a", "in/b"]).root == str(root / "in")
    assert names("in/b") == ["b/4.parquet"]
    assert captioned("in/b").root == str(root / "in")
    assert names(["in/a", "in/b"])[0] == "a/1.parquet"


def test_a_root_is_pinned_in_buckets_as_well(s3_url: str) -> None:
    for name in ("a/1.parquet", "b/4.parquet"):
        Storage(s3_url).put_atomic(f"in/{name}", Path(f"in/{name}").read_bytes())
    assert captioned([f"{s3_url}/in/a/", f"{s3_url}/in/b"]).root == f"{s3_url}/in"
    assert names(f"{s3_url}/in/a/") == ["a/1.parquet"]
    assert names(f"{s3_url}/in/b/*.parquet") == ["b/4.parquet"]


def test_without_captions_names_may_begin_anywhere(root: Path) -> None:
    spec = spec_of("in/a")
    Ledger("out").bind(spec, str(root / "in/a"))
    assert names(["in/a", "in/b"])[0] == "a/1.parquet"


def test_touched_shards_are_recognised_once_and_their_captions_stay(root: Path) -> None:
    captioned("in")
    assert not recognised(listed_input(spec_of("in"), Ledger("out")), Ledger("out")).touched
    for path in root.glob("in/**/*.parquet"):
        os.utime(path)
    write("in/b/4.parquet", first=1)
    said: list[str] = []
    ledger = Ledger("out")
    listed = listed_input(spec_of("in"), ledger)
    assert not any(state.sealed for state in ledger.plan(listed.shards).shards)
    found = recognised(listed, ledger, say=said.append)
    assert said == ["comparing 4 shards whose files have changed"]
    assert found.touched == ("a/1.parquet", "a/2.parquet", "a/sub/3.parquet")
    plan = ledger.plan(found.shards)
    assert [state.shard.name for state in plan.to_caption] == ["b/4.parquet"]
    remember(found, ledger)
    again = recognised(listed_input(spec_of("in"), ledger), ledger)
    assert again.shards == found.shards and not again.touched


def test_what_status_does_not_read_it_does_not_vouch_for(root: Path) -> None:
    captioned("in")
    assert "have other files" not in status(spec_of("in"))
    os.utime("in/b/4.parquet")
    told = "1 shards have other files than were captioned, as long as those were"
    assert told in status(spec_of("in")) and "b/4.parquet" in status(spec_of("in"))
    ledger = Ledger("out")
    remember(recognised(listed_input(spec_of("in"), ledger), ledger), ledger)
    assert "have other files" not in status(spec_of("in"))


def test_a_dataset_that_moved_is_the_same_one(root: Path) -> None:
    captioned("in")
    shutil.copytree("in", "elsewhere/in", copy_function=shutil.copy)  # with times of its own
    spec, ledger = spec_of("elsewhere/in"), Ledger("out")
    found = recognised(listed_input(spec, ledger), ledger)
    refuse_other_dataset(spec, found, ledger)
    assert ledger.plan(found.shards).finished and len(found.touched) == 4


def refused(inputs: str = "in", **limits: float) -> str:
    spec, ledger = spec_of(inputs, **limits), Ledger("out")
    found = recognised(listed_input(spec, ledger), ledger)
    try:
        refuse_recaption(spec, found, ledger)
    except SpecError as error:
        return str(error)
    return ""


def test_many_changed_rows_ask(root: Path) -> None:
    assert not refused()
    captioned("in", failed=[0, 1])
    assert not refused()
    write("in/new.parquet", rows=100)
    write("in/a/1.parquet", first=1)
    (root / "in/a/2.parquet").unlink()
    said = refused()
    assert "1 shards changed since they were captioned (a/1.parquet); 8 of the 24 rows captioned" in said
    assert "limits.max_recaption_fraction=0.1" in said and "--recaption-changed" in said
    assert not refused(max_recaption_fraction=0.34)


def test_a_repaired_shard_does_not_ask(root: Path) -> None:
    spec, ledger = spec_of("in"), Ledger("out")
    found = listed_input(spec, ledger)
    ledger.bind(spec, found.root)
    for shard in found.shards:
        table = captions(shard.name, range(shard.rows), shard.fingerprint, failed=[3])
        error = table["error"].combine_chunks()
        kind = pa.array(["read" if row else None for row in error.is_valid().to_pylist()])
        unread = pa.StructArray.from_arrays(
            [kind, error.field("stage"), error.field("message")],
            fields=list(error.type),
            mask=error.is_null(),
        )
        run_to_the_end(
            ledger, [shard], [table.set_column(table.schema.get_field_index("error"), "error", unread)]
        )
    write("in/a/1.parquet", first=1)
    assert not refused()


def test_a_root_above_all_buckets_is_pinned_too(s3_url: str, s3_endpoint: str) -> None:
    other = f"{s3_url}-2"
    urllib.request.urlopen(
        urllib.request.Request(f"{s3_endpoint}/{other[5:]}", method="PUT"), timeout=10
    ).close()
    for bucket in (s3_url, other):
        Storage(bucket).put_atomic("in/1.parquet", Path("in/a/1.parquet").read_bytes())
    captioned([f"{s3_url}/in", f"{other}/in"])
    assert names(f"{other}/in") == [f"{other[5:]}/in/1.parquet"]
