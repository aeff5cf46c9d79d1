"""`tessera run`, end to end: real Ray, real checkpoints, local disk and S3; exit codes and what stands in them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import boto3
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from actors.generate import Generate
from actors.preprocess import Preprocess
from examples.toy.dataset import write_dataset
from pipeline.input.columns import job_schema, with_kept
from pipeline.input.shards import discover
from pipeline.ledger.ledger import Ledger
from pipeline.spec.job_spec import load_spec
from tests.blocks import generate_config, picture, preprocess_config, source_block
from tests.checkpoints import untrained
from tests.commands import ROOT, environment, fresh_tessera, options, settings, tessera

SPEC = "examples/llava_onevision.yaml"
COLUMNS = ["caption", "finish_reason", "prompt_tokens", "image_tokens", "generated_tokens", "error"]


def test_captions_every_row_in_order_and_repeats_nothing(job):
    tmp_path, arguments, done = job.root, job.arguments, job.done
    assert "90 rows" in done.out and "9 errors (9 decode)" in done.out
    assert "90 / 90 rows (100%)" in done.err

    for shard in range(3):
        source = pq.read_table(tmp_path / f"in/part-{shard:05d}.parquet")
        sealed = pq.read_table(tmp_path / f"out/data/part-{shard:05d}.parquet")
        assert sealed.column_names == ["id", "truth", *COLUMNS]
        assert sealed["id"] == source["id"] and sealed["truth"] == source["truth"]
    rows = pq.read_table(tmp_path / "out/data").to_pylist()
    failed = [row for row in rows if row["error"]]
    assert len(failed) == 9 and {row["error"]["kind"] for row in failed} == {"decode"}
    for row in rows:
        assert (row["caption"] is None) == (row["finish_reason"] == "error") == (row["error"] is not None)
        assert row["error"] or (
            row["prompt_tokens"] > row["image_tokens"] > 0 and row["generated_tokens"] > 0
        )
    assert (tmp_path / "out/_SUCCESS").exists()
    assert not list((tmp_path / "out/_tessera/journal").rglob("*.parquet"))

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again = tessera("run", SPEC, *arguments)  # not even a cluster is needed
    assert again.code == 0 and "nothing to do, all 90 rows" in again.out
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()
    }

    assert tessera("verify", SPEC, *arguments).out.startswith("verified: 90 rows in, 90 rows out")
    status = tessera("status", SPEC, *arguments).out
    assert ": complete" in status and "3 sealed, 0 open" in status and "lease: free" in status
    assert "90 of 90 done, 0 missing, 9 failed (9 decode)" in status and ": done, 90 rows in" in status
    assert tessera("status", tmp_path / "out").out == status  # an output knows its job
    (run,) = Ledger(str(tmp_path / "out")).runs()
    engine = run["engine"]
    assert engine["engine"] == "continuous" and engine["dtype"] == "float32" and engine["replicas"] in (1, 2)
    for told in (done.err, status):
        assert f"continuous on {engine['device']}, float32, " in told
    page = tmp_path / "page.html"
    assert tessera("report", SPEC, *arguments, "--truth", "truth", "-o", page).code == 0
    assert page.read_text().count("data:image/") >= 30


def test_the_output_opens_in_the_readers_people_have(job, tmp_path):
    import datasets
    import pandas

    data = job.root / "out/data"
    expected = [row["caption"] for row in pq.read_table(data).to_pylist()]
    frame = pandas.concat([pandas.read_parquet(path) for path in sorted(data.iterdir())])
    assert [None if pandas.isna(caption) else caption for caption in frame["caption"]] == expected
    table = duckdb.sql(
        f"select caption, error.kind from read_parquet('{data}/*.parquet') order by id"
    ).fetchall()
    assert [caption for caption, _ in table] == expected and [kind for _, kind in table].count("decode") == 9
    loaded = datasets.load_dataset(
        "parquet", data_files=str(data / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["caption"] == expected


def test_the_same_on_s3_with_too_many_errors_told(tmp_path, ray_address, s3_endpoint, s3_url):
    write_dataset(tmp_path / "in", rows=20, shards=2, seed=3, corrupt=0.2)
    bucket = s3_url.removeprefix("s3://")
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    for path in sorted((tmp_path / "in").iterdir()):
        client.upload_file(str(path), bucket, f"in/deep/{path.name}")
    arguments = options(tmp_path, input__path=f"{s3_url}/in/", output__path=f"{s3_url}/out/")
    done = tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address)
    assert done.code == 3
    assert "4 of 20 rows failed (20.0%)" in done.err and "limits.max_failed_fraction=0.1" in done.err
    keys = sorted(item["Key"] for item in client.list_objects_v2(Bucket=bucket, Prefix="out/")["Contents"])
    assert sum(key.startswith("out/_tessera/input/") for key in keys) == 2
    assert [key for key in keys if "/runs/" not in key and "/input/" not in key] == [
        "out/_SUCCESS",
        "out/_tessera/lease.json",
        "out/_tessera/spec.json",
        "out/data/deep/part-00000.parquet",
        "out/data/deep/part-00001.parquet",
    ]
    lenient = tessera("run", SPEC, *arguments, "--set=limits.max_failed_fraction=0.2")
    assert lenient.code == 0 and "nothing to do" in lenient.out


def test_videos_are_captioned_as_by_generate(tmp_path, ray_address):
    path = untrained("llava_onevision")
    colors = ("red", "green", "blue", "white", "gray")
    videos = [[picture(60, 50, colors[(row + step) % 5]) for step in range(row)] for row in range(8)]
    videos[5][1] = videos[5][1][:30]
    images = [picture(40, 40)] * 3 + [None] * 5
    images[0] = picture(90, 50, "blue")  # row 0's video has no frames
    (tmp_path / "in").mkdir()
    columns = {"id": range(8), "image": images, "clip": videos}
    pq.write_table(pa.table(columns), tmp_path / "in/a.parquet")
    arguments = options(tmp_path, input__video="clip", input__max_frames=4)
    arguments += settings(input__prompt="null", input__keep="[id]", limits__max_failed_fraction=0.2)
    done = tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address)
    assert done.code == 0 and "1 errors (1 decode)" in done.out, done.err

    used = [
        video[:4] if len(video) < 5 else [video[i * len(video) // 4] for i in range(4)] for video in videos
    ]
    block = source_block([[image] if image else [] for image in images], videos=used, id=range(8))
    config = preprocess_config(path, prompt_column=None, max_new_tokens=6)
    expected = Generate(generate_config(path, max_new_tokens=6))(Preprocess(config)(block)).to_pylist()
    found = pq.read_table(tmp_path / "out/data/a.parquet").to_pylist()
    assert [row["caption"] for row in found] == [row["caption"] for row in expected]
    assert [row["image_tokens"] for row in found] == [row["image_tokens"] for row in expected]
    assert "frame 2 of the video's 4" in found[5]["error"]["message"]

    other = [*arguments, f"--set=model.path={untrained('fuyu')}", f"--set=output.path={tmp_path / 'other'}"]
    refused = tessera("run", SPEC, *other)  # before any cluster is asked for
    assert refused.code == 2 and "input.video: " in refused.err
    assert refused.err.splitlines()[-1].endswith("fuyu takes no videos; LLaVA-OneVision does")


def test_what_is_in_the_journal_is_not_generated_again(tmp_path, ray_address):
    write_dataset(tmp_path / "in", rows=40, shards=2, seed=4)
    arguments = options(tmp_path)
    spec = load_spec(SPEC, [argument.removeprefix("--set=") for argument in arguments])
    shards = discover(spec.input).shards
    ledger = Ledger(spec.output.path)
    ledger.bind(with_kept(spec, job_schema(spec, shards)))
    source = pq.read_table(tmp_path / "in/part-00000.parquet", columns=job_schema(spec, shards).names).slice(
        5, 10
    )
    part = source.append_column("_shard", pa.array([shards[0].name] * 10))
    part = part.append_column("_row", pa.array(range(5, 15), pa.int64()))
    part = part.append_column("_fingerprint", pa.array([shards[0].fingerprint] * 10))
    for name, value in zip(COLUMNS, ("from before", "stop", 9, 4, 2, None), strict=True):
        part = part.append_column(name, pa.array([value] * 10))
    ledger.publish(part)

    done = tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address)
    assert done.code == 0 and "30 of them now" in done.out, done.err
    captions = pq.read_table(tmp_path / "out/data/part-00000.parquet")["caption"].to_pylist()
    assert [caption == "from before" for caption in captions] == [5 <= row < 15 for row in range(20)]

    write_dataset(tmp_path / "more", rows=7, shards=1, seed=5)
    (tmp_path / "more/part-00000.parquet").rename(tmp_path / "in/part-00002.parquet")
    grown = tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address)
    assert grown.code == 0 and "47 rows" in grown.out and "7 of them now" in grown.out


def test_damaged_shards_cost_their_rows_and_are_named(tmp_path, ray_address):
    whole = [path.read_bytes() for path in write_dataset(tmp_path / "in", rows=128, shards=4, seed=2)]
    good, smashed, empty, footer = sorted((tmp_path / "in").iterdir())
    group = pq.read_metadata(smashed).row_group(0)  # of two, of 16 rows
    page = group.column(1).dictionary_page_offset or group.column(1).data_page_offset  # image.bytes
    smashed.write_bytes(whole[1][:page] + b"\xff" * 64 + whole[1][page + 64 :])
    empty.write_bytes(b"")
    footer.write_bytes(whole[3][:4] + b"\xff" * (len(whole[3]) - 12) + whole[3][-8:])

    out, arguments = tmp_path / "out", options(tmp_path, limits__max_failed_fraction=0.5)
    done = tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address)
    assert done.code == 3 and "64 rows" in done.out and "16 errors (16 read)" in done.out, done.err
    told = done.err.splitlines()[-1]
    reasons = [
        f"{empty} is empty (0 bytes)",
        f"{footer} has a damaged",
        f"{smashed} has 16 of 32 rows that cannot",
    ]
    assert told.startswith("tessera: 3 shards failed: ") and all(reason in told for reason in reasons)
    assert "row group 0 of part-00001.parquet" in told and "limits.max_failed_shards=0" in told
    rows = pq.read_table(out / "data").to_pylist()
    assert [row["error"] and row["error"]["kind"] for row in rows] == [
        *[None] * 32,
        *["read"] * 16,
        *[None] * 16,
    ]
    assert all((row["id"] is None) == (row["caption"] is None) == (row["error"] is not None) for row in rows)
    assert not (out / "_SUCCESS").exists()
    (record,) = Ledger(str(out)).runs()
    assert set(record["failed_shards"]) == {smashed.name, empty.name, footer.name}

    # There is nothing to generate, so no cluster is needed.
    again = tessera("run", SPEC, *arguments, RAY_ADDRESS="127.0.0.1:1")
    assert again.code == 3 and "all 64 rows of the readable shards are captioned" in again.out
    assert again.err.splitlines()[-1] == told
    status = tessera("status", out).out
    assert "2 sealed, 0 open, 2 unreadable" in status and all(
        f"failed: {reason}" in status for reason in reasons
    )
    verify = tessera("verify", out)
    assert verify.code == 3 and verify.out.startswith("verified: 64 rows in, 64 rows out\n  unreadable: ")
    assert (
        f"2 shards failed: {reasons[0]}" in verify.err and "repair or remove them and run again" in verify.err
    )
    assert tessera("report", out, "-o", tmp_path / "page.html").code == 0
    assert "3 shards failed: " in (tmp_path / "page.html").read_text()
    assert tessera("run", SPEC, *arguments, "--set=limits.max_failed_shards=3").code == 0
    assert not (out / "_SUCCESS").exists()

    for path, data in zip((good, smashed, empty, footer), whole, strict=True):
        if path != good:
            path.write_bytes(data)
    repaired = tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address)
    assert repaired.code == 0 and "128 rows" in repaired.out and "no errors; 96 of them now" in repaired.out
    assert (out / "_SUCCESS").exists() and tessera("verify", out).code == 0


def test_an_output_that_is_the_input_or_another_datasets_is_refused(job, tmp_path):
    write_dataset(tmp_path / "in", rows=2, shards=1, seed=1)
    done = tessera("run", SPEC, *options(tmp_path), f"--set=output.path={tmp_path}/in/../in/")
    assert done.code == 2 and "output.path: " in done.err and "input.path" in done.err
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["part-00000.parquet"]
    other = [*job.arguments, f"--set=input.path={tmp_path / 'in'}"]
    before = {path: path.stat().st_mtime_ns for path in (job.root / "out").rglob("*")}
    done = tessera("run", SPEC, *other)
    assert done.code == 2 and "holds captions of 3 shards" in done.err and "new folder" in done.err
    assert before == {path: path.stat().st_mtime_ns for path in (job.root / "out").rglob("*")}


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """On a local Ray of its own, as on a laptop; the driver and all of Ray die at once."""
    write_dataset(tmp_path / "in", rows=256, shards=2, seed=6)
    arguments = options(tmp_path, generation__max_new_tokens=20)
    command = [sys.executable, "-m", "jobs.cli", "run", SPEC, *arguments]
    env = environment()
    env.pop("RAY_ADDRESS", None)
    journal = tmp_path / "out/_tessera/journal"
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as victim:
        deadline = time.monotonic() + 240
        while not (journal.is_dir() and list(journal.glob("*/part-*"))):
            assert victim.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(victim.pid, signal.SIGKILL)
    kept = sum(pq.read_metadata(path).num_rows for path in journal.glob("*/part-*"))
    kept += sum(pq.read_metadata(path).num_rows for path in (tmp_path / "out").glob("data/*.parquet"))
    assert 0 < kept < 256
    done = tessera("run", SPEC, *arguments)
    assert done.code == 0 and "256 rows" in done.out, done.err
    # Workers of a dead driver may have published a last block before they, too, were gone.
    now = re.search(r"(\d+) of them now", done.out)
    assert now and 0 < int(now[1]) <= 256 - kept
    assert pq.read_table(tmp_path / "out/data")["caption"].null_count == 0


def test_a_full_disk_is_said_in_a_folder_that_has_packages_of_our_names(tmp_path):
    """On a local Ray of its own, started in somebody's repository; every process of it finds the disk full."""
    for name in ("pipeline", "actors"):
        (tmp_path / "repository" / name).mkdir(parents=True)
        (tmp_path / "repository" / name / "__init__.py").write_text("raise RuntimeError('theirs')")
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults/disk-full").touch()
    write_dataset(tmp_path / "in", rows=3, shards=1, seed=1)
    done = fresh_tessera(
        "run",
        ROOT / SPEC,
        *options(tmp_path),
        cwd=tmp_path / "repository",
        PYTHONPATH=f"{ROOT / 'tests/chaos/site'}:{ROOT}",
        TESSERA_CHAOS=str(tmp_path / "faults"),
    )
    assert done.code == 1 and "Traceback" not in done.err
    said = done.err.splitlines()[-1]
    assert said.startswith(f"tessera: writing {tmp_path}/out/_tessera/journal/part-"), done.err
    assert said.endswith(": No space left on device")


def test_a_wrong_spec_exits_2_at_once(tmp_path):
    done = tessera("run", SPEC, *options(tmp_path, generation__max_new_tokens=0))
    assert done.code == 2 and "generation.max_new_tokens" in done.err and "Traceback" not in done.err
    done = tessera("run", SPEC, *options(tmp_path))
    assert done.code == 2 and f"{tmp_path / 'in'} does not exist" in done.err
    write_dataset(tmp_path / "in", rows=2, shards=1, seed=1)
    done = tessera("run", SPEC, *options(tmp_path), "--set=input.image=images")
    assert done.code == 2 and "input.image" in done.err and "did you mean 'image'" in done.err
    assert not (tmp_path / "out").exists()


def test_another_jobs_output_is_not_touched(job):
    done = tessera("run", SPEC, *job.arguments, "--set=generation.max_new_tokens=7")
    assert done.code == 2 and "generation.max_new_tokens (6 there, 7 here)" in done.err


def test_a_broken_job_exits_1_with_one_sentence(tmp_path, ray_address):
    write_dataset(tmp_path / "in", rows=3, shards=1, seed=1)
    greedy = options(tmp_path, resources__generate__gpus=8)
    done = tessera("run", SPEC, *greedy, RAY_ADDRESS=ray_address)
    assert done.code == 1 and done.err.splitlines()[-1].startswith(
        "tessera: the job needs 8 GPUs and the cluster has 2"
    )
    done = tessera("run", SPEC, *options(tmp_path), RAY_ADDRESS="127.0.0.1:1")
    assert done.code == 1 and "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1" in done.err


def test_a_checkpoint_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path):
    write_dataset(tmp_path / "in", rows=3, shards=1, seed=1)
    folder = shutil.copytree(untrained("llava_onevision"), tmp_path / "llava")

    def refused(model, code, reason, **network):
        done = fresh_tessera(
            "run", SPEC, *options(tmp_path, model__path=model), RAY_ADDRESS="127.0.0.1:1", **network
        )
        *phases, told = done.err.splitlines()
        assert (done.code, told[: len(reason)]) == (code, reason)
        assert phases[0].startswith("looking at") and phases[-1].startswith("looking at"), phases
        assert not (tmp_path / "out").exists()

    refused(
        tmp_path / "lava", 2, f"tessera: model.path: {tmp_path}/lava: no such folder (did you mean {folder}?)"
    )
    (folder / "tokenizer.json").unlink()
    refused(folder, 2, f"tessera: model.path: {folder}: no tokenizer there: none of tokenizer.json, ")
    os.truncate(folder / "model.safetensors", 500)
    refused(
        folder, 2, f"tessera: model.path: {folder}: model.safetensors is truncated or damaged (500 bytes: "
    )
    hub = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    unreachable = "no such folder here, and the hub cannot be reached at http://127.0.0.1:1 "
    refused("org/model", 1, f"tessera: model.path: org/model: {unreachable}", **hub)


@pytest.mark.parametrize("family", ["aria", "fuyu"])
def test_weights_that_cannot_be_loaded_break_the_job(tmp_path, ray_address, family):
    broken = shutil.copytree(untrained(family), tmp_path / "checkpoint")
    weights = load_file(broken / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    write_dataset(tmp_path / "in", rows=3, shards=1, seed=1)
    done = tessera(
        "run", f"examples/{family}.yaml", *options(tmp_path, model__path=broken), RAY_ADDRESS=ray_address
    )
    assert done.code == 1 and "1 weights are missing, e.g. lm_head.weight" in done.err.splitlines()[-1]
