"""Stores that are not quite S3, outputs that are not there or not ours: a warning, or one sentence and an exit code."""

import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from s3fs import S3FileSystem

from examples.toy.dataset import write_dataset
from jobs.cli import main
from pipeline.input.columns import job_schema
from pipeline.input.shards import discover
from pipeline.ledger.ledger import RUNS, SUCCESS, Ledger
from pipeline.run.progress import display
from pipeline.run.session import open_session
from pipeline.spec.job_spec import load_spec, parse_spec
from pipeline.storage import lease as leases
from pipeline.storage import retrying
from pipeline.storage.lease import LeaseHeld, LeaseLost, acquire
from pipeline.storage.storage import Storage
from tests.chaos.proxy import Proxy, bad_weather
from tests.pipeline.ledgers import KEPT, captions, journal, shard

CONDITIONS = frozenset({"if-match", "if-none-match"})


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[Proxy]:
    """The way to a store that a test makes less than S3."""
    with pytest.MonkeyPatch.context() as patch, bad_weather(s3_endpoint, seed=0, share=0) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        S3FileSystem.clear_instance_cache()
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def output(proxy: Proxy, s3_endpoint: str) -> str:
    """A new output in a bucket behind it."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/out"


def session(output: str):
    sections = {"input": {"path": "in"}, "model": {"path": "m"}, "output": {"path": output}}
    with display("job", io.StringIO()) as show:
        return open_session(parse_spec(sections), False, show)


def warnings_of(output: str) -> list[str]:
    storage = Storage(output)
    (record,) = storage.list(RUNS)
    return json.loads(storage.read(record.path)).get("warnings", [])


@pytest.mark.parametrize("how", ["ignores", "refuses"])
def test_a_store_without_conditional_writes_is_warned_of_and_compared_with(
    proxy: Proxy, output: str, caplog: pytest.LogCaptureFixture, monkeypatch, how: str
) -> None:
    monkeypatch.setattr(leases, "_WATCH_SECONDS", 0.05)
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    setattr(proxy, how, CONDITIONS)
    storage = Storage(output)
    with session(output) as held:
        with pytest.raises(LeaseHeld):
            acquire(storage, "second")
        ledger, one = held.ledger, shard("a.parquet", 2)
        ledger.publish(captions(one.name, range(2)))
        ledger.seal(one, KEPT)
        ledger.write_success(ledger.verify([one]))
        ledger.clear_success()
        assert ledger.verify([one]).ok and not storage.exists(SUCCESS)
    (said,) = {record.message for record in caplog.records}
    assert "does not keep conditional writes" in said and output in said and "one at a time" in said
    assert warnings_of(output) == [said]
    assert storage.create_exclusive("_tessera/spec.json", b"1")
    _, version = storage.read_version("_tessera/spec.json")
    storage.put_atomic("_tessera/spec.json", b"2")
    assert not storage.create_exclusive("_tessera/spec.json", b"3")
    assert not storage.put_if("_tessera/spec.json", b"3", version)
    assert not storage.delete_if("_tessera/spec.json", version)
    assert storage.read("_tessera/spec.json") == b"2"
    assert not any("probe" in info.path for info in storage.list())


def test_s3_keeps_conditional_writes_and_says_nothing(proxy: Proxy, output: str, caplog) -> None:
    with session(output):
        pass
    assert not caplog.records and warnings_of(output) == []


def test_a_store_without_multiple_deletes_is_served_key_by_key(proxy: Proxy, output: str) -> None:
    proxy.refuses = frozenset({"?delete"})
    ledger, one = Ledger(output), shard("a.parquet", 4)
    for row in range(4):
        ledger.publish(captions(one.name, [row]))
    ledger.seal(one, KEPT)
    assert len(ledger.sweep([one])) == 4
    assert journal(ledger) == [] and ledger.verify([one]).ok


def test_single_deletes_ask_for_the_lease_too(proxy: Proxy, output: str) -> None:
    proxy.refuses = frozenset({"?delete"})
    asked: list[int] = []

    def guard() -> None:
        asked.append(1)
        if len(asked) > 1:  # the first one asked for all of them
            raise LeaseLost("taken over")

    Storage(output).put_atomic("a", b"1")
    Storage(output).put_atomic("b", b"1")
    with pytest.raises(LeaseLost):
        Storage(output, guard=guard).delete(["a", "b"])
    assert len(Storage(output).list()) == 2


COMMANDS = {"status": [], "verify": [], "report": ["-o", "{page}"], "retry": ["--only", "decode"]}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The folder of a job of four rows in two shards, in/ to out/, which is done."""
    write_dataset(tmp_path / "in", rows=4, shards=2, seed=1)
    places = [f"input.path={tmp_path / 'in'}", f"output.path={tmp_path / 'out'}", "input.keep=[id]"]
    spec = load_spec("examples/llava_onevision.yaml", places)
    ledger, shards = Ledger(spec.output.path), discover(spec.input).shards
    ledger.bind(spec)
    for one in shards:
        ledger.publish(captions(one.name, range(one.rows), one.fingerprint).drop(["score"]))
        ledger.seal(one, job_schema(spec, shards))
    ledger.sweep(shards)
    ledger.write_success(ledger.verify(shards))
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], command: str, target: object, page: object) -> tuple[int, str]:
    """The exit code of a command, and its one sentence."""
    more = [text.format(page=page) for text in COMMANDS[command]]
    capsys.readouterr()
    code = main([command, str(target), *more])
    said = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in said)
    assert len([line for line in said if line.startswith("tessera: ")]) == (code != 0)
    return code, said[-1] if said else ""


NOWHERE = {  # there is no output here, and no job: code 2 and why
    "{tmp}/nothing": "is no job spec (.yaml) and no output of Tessera's, for there is nothing of that name",
    "{tmp}/in": "is no job spec (.yaml) and no output of Tessera's, for it has no _tessera/spec.json",
    "{tmp}/in/part-00000.parquet": "is no job spec (.yaml) and no output of Tessera's",
    "{tmp}/in/part-00000.parquet/x": "is no job spec (.yaml) and no output of Tessera's",
    "{tmp}/nothing.yaml": "nothing.yaml: the job spec cannot be read (No such file or directory)",
    "": "is no job spec (.yaml) and no output of Tessera's",
    "file:/x": "'file:/x' is neither a path nor a URL: write scheme://",
    "s3:/bucket/x": "'s3:/bucket/x' is neither a path nor a URL: write scheme://",
    "a::b": "'a::b' is neither a path nor a URL: write scheme://",
    "s3://": "'s3://' names no folder",
    "hf://": "'hf://' names no folder",
    "nosuch://x/y": "'nosuch://x/y' cannot be opened: Protocol not known: nosuch",
    "gs://x/y": "'gs://x/y' cannot be opened: Please install gcsfs",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_where_there_is_no_output_it_is_said(job: Path, capsys, command: str) -> None:
    for target, words in NOWHERE.items():
        code, said = told(capsys, command, target.format(tmp=job), job / "page.html")
        assert code == 2 and words in said, said


def test_an_empty_bucket_is_no_output(s3_url: str, capsys) -> None:
    for command in COMMANDS:
        code, said = told(capsys, command, f"{s3_url}/out", "page.html")
        assert code == 2 and f"{s3_url}/out: is no job spec" in said


def test_an_endpoint_that_is_down_is_said_with_the_address(s3_url: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(retrying, "BUDGET_SECONDS", 0.3)
    S3FileSystem.clear_instance_cache()
    for command in COMMANDS:
        code, said = told(capsys, command, f"{s3_url}/out", "page.html")
        assert code == 1 and f"reading {s3_url}/out/_tessera/spec.json: storage failed" in said
        assert "127.0.0.1:9" in said
    S3FileSystem.clear_instance_cache()


DAMAGED = [
    b"",
    b"\xff\xfe{",
    b'{"fields":',
    b"[]",
    b"null",
    b'{"fields": {}}',
    b'{"fields": {}, "spec": null}',
]


@pytest.mark.parametrize("command", [*COMMANDS, "run"])
def test_a_damaged_spec_is_named_and_nothing_is_written_over_it(job: Path, capsys, command: str) -> None:
    file = job / "out/_tessera/spec.json"
    run = [
        "run",
        "examples/llava_onevision.yaml",
        f"--set=input.path={job}/in",
        f"--set=output.path={job}/out",
    ]
    for data in DAMAGED:
        file.write_bytes(data)
        if command == "run":
            code, said = main(run), capsys.readouterr().err.splitlines()[-1]
        else:
            code, said = told(capsys, command, job / "out", job / "page.html")
        assert code == 2 and f"{file} is damaged, " in said and "output.path" in said
        assert file.read_bytes() == data


def test_a_spec_of_another_version_is_told_in_one_sentence(job: Path, capsys) -> None:
    file = job / "out/_tessera/spec.json"
    record = json.loads(file.read_text())
    record["spec"]["input"]["pictures"] = record["spec"]["limits"]["patience"] = 1
    file.write_text(json.dumps(record))
    for command in COMMANDS:
        code, said = told(capsys, command, job / "out", job / "page.html")
        assert code == 2 and "unknown field input.pictures" in said and "another version of Tessera" in said


def test_damaged_files_of_an_output_are_named(job: Path, capsys) -> None:
    out, page = job / "out", job / "page.html"
    assert [told(capsys, command, out, page)[0] for command in ("status", "verify", "report")] == [0, 0, 0]
    (out / "_tessera/runs").mkdir()
    (out / "_tessera/runs/x.json").write_bytes(b"{")
    (out / "_tessera/lease.json").write_bytes(b"\xff")
    assert [told(capsys, command, out, page)[0] for command in ("status", "verify", "report")] == [0, 0, 0]
    (out / "data/part-00000.parquet").write_bytes(b"PAR1")
    assert told(capsys, "status", out, page)[0] == 0
    code, said = told(capsys, "verify", out, page)
    assert code == 1 and f"{out} is not what its input asks for" in said and "tessera run" in said
    code, said = told(capsys, "report", out, page)
    assert (
        code == 1 and f"{out}/data/part-00000.parquet cannot be read" in said and "run the job again" in said
    )


def test_deep_verification_finds_what_footers_do_not_tell(job: Path, capsys) -> None:
    file = job / "out/data/part-00001.parquet"
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(job / "out")]) == 0
    assert capsys.readouterr().out == (
        "verified: 4 rows in, 4 rows out\n  by the files' footers; --deep reads every page\n"
    )
    assert main(["verify", str(job / "out"), "--deep"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("not verified") and "data/part-00001.parquet does not hold the rows" in said


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that every user can reach, in which this process has no more rights than others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Nobody in particular: root may read and write everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_missing_right_is_named_with_its_file(job: Path, open_to_all: Path, capsys) -> None:
    out = open_to_all / "out"
    shutil.copytree(job / "out", out)
    (out / "_tessera").chmod(0o700)
    out.chmod(0o755)
    if os.geteuid():
        (out / "_tessera").chmod(0)
    for command in COMMANDS:
        with unprivileged():
            code, said = told(capsys, command, out, job / "page.html")
        assert code == 1 and said == f"tessera: {out}/_tessera/spec.json: Permission denied"
    (out / "_tessera").chmod(0o700)


def test_an_output_that_cannot_be_written_is_named(job: Path, open_to_all: Path, monkeypatch) -> None:
    out = open_to_all / "out"
    out.mkdir(mode=0o555)
    with (
        unprivileged(),
        pytest.raises(PermissionError, match=rf"writing {out}/_tessera/lease.json: permission denied"),
    ):
        acquire(Storage(str(out)), "run")


def test_an_output_path_that_is_a_file_is_refused(job: Path, capsys) -> None:
    for path in (job / "page.html", job / "page.html/x"):
        (job / "page.html").write_text("x")
        spec = ["examples/llava_onevision.yaml", f"--set=input.path={job}/in", f"--set=output.path={path}"]
        assert main(["run", *spec]) == 2
        assert f"tessera: output.path: {path} is a file, or lies below one" in capsys.readouterr().err
