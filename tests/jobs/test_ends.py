"""How runs end before they are done, and what comes after: stopped, locked out, taken over, tried again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.toy.dataset import write_dataset
from pipeline.ledger.ledger import JOURNAL, RETRY, RUNS
from pipeline.storage.lease import LEASE, acquire, holder_of
from pipeline.storage.storage import Storage
from tests.blocks import picture
from tests.checkpoints import untrained
from tests.commands import ROOT, environment, options, tessera

SPEC = "examples/llava_onevision.yaml"


@contextmanager
def running(arguments: list[str], ray_address: str) -> Iterator[subprocess.Popen[str]]:
    """`tessera run` in the background."""
    command = [sys.executable, "-m", "jobs.cli", "run", SPEC, *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(RAY_ADDRESS=ray_address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until_captioning(out: Path, process: subprocess.Popen[str]) -> None:
    """Waits for the first journal part."""
    deadline = time.monotonic() + 200
    while not list((out / JOURNAL).glob("*/part-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def rows_done(out: Path) -> int:
    files = [*(out / JOURNAL).glob("*/part-*"), *out.glob("data/*.parquet")]
    return sum(pq.read_metadata(path).num_rows for path in files)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 5), (signal.SIGINT, 130)])
def test_a_stopped_run_publishes_what_is_in_hand_and_the_next_does_the_rest(
    tmp_path, ray_address, number, code
):
    write_dataset(tmp_path / "in", rows=2016, shards=1, seed=6)
    out, arguments = tmp_path / "out", options(tmp_path, generation__max_new_tokens=20)
    with running(arguments, ray_address) as process:
        until_captioning(out, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == code, said
    assert f"stopped by {signal.Signals(number).name}" in said.splitlines()[-1]
    assert "the same command goes on from there" in said and "Traceback" not in said
    lease = json.loads((out / LEASE).read_text())
    assert lease["released"] and lease["draining"]
    kept = rows_done(out)
    assert 32 <= kept < 2016 and kept % 32 == 0  # whole blocks: what was being generated was finished
    (run,) = (json.loads(path.read_text()) for path in (out / RUNS).iterdir())
    assert run["ended"] == "stopped"
    if number == signal.SIGINT:  # what comes after is the same
        return
    assert ": stopped, " in tessera("status", out).out
    done = tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address)
    assert done.code == 0 and f"{2016 - kept:,} of them now" in done.out, done.err


def test_one_run_at_a_time(folder):
    out, arguments = folder / "out", options(folder)
    (out / "_SUCCESS").unlink()  # or there is nothing to do, which takes no lease
    with acquire(Storage(str(out)), "first"):
        second = tessera("run", SPEC, *arguments)
        assert second.code == 4
        said = second.err.splitlines()[-1]
        assert f"{out} is held by run first" in said and f"(pid {os.getpid()}) since 2" in said
        assert "--take-over" in said and "lease: run first" in tessera("status", out).out
    assert "lease: free" in tessera("status", out).out


def test_people_may_take_over(tmp_path, ray_address):
    write_dataset(tmp_path / "in", rows=640, shards=2, seed=6)
    out, arguments = tmp_path / "out", options(tmp_path, generation__max_new_tokens=20)
    with running(arguments, ray_address) as process:
        until_captioning(out, process)
        os.kill(process.pid, signal.SIGSTOP)
        assert process.poll() is None
        before = holder_of(Storage(str(out)))
        with running([*arguments, "--take-over"], ray_address) as third:
            while holder_of(Storage(str(out))) in (before, None):
                assert third.poll() is None
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGCONT)  # which also frees its part of the cluster for the third
            _, said = process.communicate(timeout=120)
            assert process.returncode == 4, said
            assert f"(pid {third.pid})" in said.splitlines()[-1] and "took it over" in said
            done, said = third.communicate(timeout=200)
            assert third.returncode == 0 and "640 rows in" in done, said
    assert tessera("verify", out).code == 0


def write_pictures(folder: Path) -> None:
    """Two shards of four rows; the second has a corrupt image, and two by paths where no file is yet."""
    good, late = {"bytes": picture(), "path": None}, {"bytes": None, "path": "late.png"}
    folder.mkdir()
    for name, images in (
        ("a.parquet", [good] * 4),
        ("b.parquet", [good, late, {"bytes": b"x", "path": None}, late]),
    ):
        rows = {"id": [f"{name}:{n}" for n in range(4)], "truth": [""] * 4, "prompt": ["What is it?"] * 4}
        image = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        pq.write_table(pa.table({**rows, "image": image}), folder / name)


def test_error_rows_are_tried_again_and_nothing_else_is_touched(tmp_path, ray_address):
    write_pictures(tmp_path / "in")
    out, arguments = tmp_path / "out", options(tmp_path, limits__max_failed_fraction=0.2)
    assert tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address).code == 3

    def rows(name: str) -> list[dict[str, object]]:
        return pq.read_table(out / "data" / name).to_pylist()

    before, untouched = rows("b.parquet"), (out / "data/a.parquet").stat()
    wrong = tessera("retry", out, "--only", "broken")
    assert wrong.code == 2 and "no kind of error 'broken'" in wrong.err and "decode" in wrong.err
    assert "nothing to do" in tessera("retry", out, "--only", "oom,crash").out

    (tmp_path / "in/late.png").write_bytes(picture(color="blue"))
    again = tessera("retry", out, "--only", "fetch,oom", RAY_ADDRESS=ray_address)
    assert again.code == 0 and "1 errors (1 decode); 2 of them now" in again.out, again.err
    after = rows("b.parquet")
    record = json.loads(max((out / "_tessera/runs").iterdir()).read_text())
    assert record["generated_tokens"] == sum(int(str(after[n]["generated_tokens"])) for n in (1, 3)) > 0
    assert [row["error"] for row in after] == [None, None, before[2]["error"], None]
    assert [after[n] for n in (0, 2)] == [before[n] for n in (0, 2)]
    assert all(after[n]["caption"] is not None and after[n]["id"] == before[n]["id"] for n in (1, 3))
    assert (out / "data/a.parquet").stat() == untouched
    assert tessera("verify", out).code == 0 and (out / "_SUCCESS").exists()
    assert not (out / RETRY).exists()


def test_another_checkpoint_is_refused_and_a_removed_shard_is_reported(folder):
    out, arguments = folder / "out", options(folder)
    other = tessera("run", SPEC, *options(folder, model__path=untrained("fuyu")))
    assert other.code == 2 and "model.weights" in other.err and "Set output.path to a new folder" in other.err
    (folder / "in/part-00000.parquet").unlink()  # of the three the one with most errors
    for done in (tessera("run", SPEC, *arguments), tessera("status", out), tessera("verify", out)):
        assert done.code == 0 and "data/part-00000.parquet" in done.out
    nowhere = tessera("status", folder / "in")
    assert nowhere.code == 2 and "no output of Tessera's" in nowhere.err


def test_jobs_beside_each_other_wait_for_room_say_so_and_finish(tmp_path, ray_address):
    """Three at once, each of which needs the whole cluster. Whichever is first runs; one that waits is stopped."""
    processes: dict[Path, subprocess.Popen[str]] = {}
    for name in "abc":
        root = tmp_path / name
        write_dataset(root / "in", rows=64, shards=1, seed=1)
        command = [sys.executable, "-m", "jobs.cli", "run", SPEC, *options(root, resources__generate__cpus=2)]
        with (root / "said").open("w") as said:
            processes[root] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(RAY_ADDRESS=ray_address),
                stdout=said,
                stderr=said,
                text=True,
            )

    def waiting() -> list[Path]:
        return [root for root in processes if "waiting for room" in (root / "said").read_text()]

    try:
        deadline = time.monotonic() + 240
        while len(waiting()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stopped, second = waiting()
        processes[stopped].terminate()
        assert processes.pop(stopped).wait(120) == 5
        assert "the same command goes on from there" in (stopped / "said").read_text().splitlines()[-1]
        assert all(process.wait(200) == 0 for process in processes.values())
    finally:
        for process in processes.values():
            process.kill()
    lines = (second / "said").read_text().splitlines()
    line = next(line for line in lines if line.startswith("waiting for room on the cluster: "))
    needed = "the job needs at least 4 CPUs and 0 GPUs; the cluster has 4 CPUs and 2 GPUs, of which "
    assert needed in line or "another job is placing its actors" in line
    assert lines.index("loading the model") > lines.index(line)


def test_a_run_stops_when_its_first_rows_all_fail_alike(tmp_path, ray_address):
    (tmp_path / "in").mkdir()
    image = pa.array([{"bytes": b"x", "path": None}])
    for number in range(200):  # files: each is a task, so the run takes longer than a look at it
        pq.write_table(pa.table({"image": image}), tmp_path / f"in/{number:03}.parquet")
    arguments = options(tmp_path, limits__stop_after_failures=5, input__prompt="null", input__keep="null")
    done = tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address)
    said = done.err.splitlines()[-1]
    assert done.code == 3 and re.match(r"tessera: the first \d+ rows all failed with 'decode', ", said), (
        done.err
    )
    assert re.search(r"for instance \d{3}\.parquet row 0: .*limits\.stop_after_failures \(now 5\)", said)
    sealed = {path.name for path in (tmp_path / "out/data").glob("*.parquet")}  # one row each
    journaled = {path.parent.name for path in (tmp_path / "out" / JOURNAL).glob("*/part-*")}
    assert 5 <= len(sealed | journaled) < 200
    assert not (tmp_path / "out/_SUCCESS").exists()
