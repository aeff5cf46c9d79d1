"""Input that changes under a job, as a user meets it: rewritten, touched, grown by a column; and odd names."""

import io
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq

from examples.toy.dataset import write_dataset
from pipeline.input.columns import job_schema, with_kept
from pipeline.ledger.job_input import listed_input
from pipeline.ledger.ledger import JOURNAL, Ledger
from pipeline.spec.job_spec import load_spec
from tests.blocks import picture
from tests.commands import ROOT, environment, options, tessera

SPEC = "examples/llava_onevision.yaml"
RESULTS = {
    "caption": "old",
    "finish_reason": "stop",
    "prompt_tokens": 9,
    "image_tokens": 4,
    "generated_tokens": 2,
}


def publish_first_row(arguments: list[str], name: str) -> None:
    """What a killed run left: the caption of a shard's first row."""
    spec = load_spec(SPEC, [argument.removeprefix("--set=") for argument in arguments])
    ledger = Ledger(spec.output.path)
    found = listed_input(spec, ledger)
    kept = job_schema(spec, found.shards)
    ledger.bind(with_kept(spec, kept), found.root)
    (shard,) = (shard for shard in found.shards if shard.name == name)
    (row,) = pq.read_table(shard.url, columns=kept.names).slice(0, 1).to_pylist()
    identity = {"_shard": name, "_row": 0, "_fingerprint": shard.fingerprint}
    ledger.publish(pa.Table.from_pylist([{**row, **identity, **RESULTS, "error": None}]))


def column(path: Path, name: str) -> list[str]:
    return pq.read_table(path)[name].to_pylist()


def test_a_shard_that_changes_while_a_job_runs_and_what_comes_after(tmp_path, ray_address):
    first, second = write_dataset(tmp_path / "in", rows=8, shards=2, seed=1)
    (new,) = write_dataset(tmp_path / "new", rows=6, shards=1, seed=2)
    out, arguments = tmp_path / "out", options(tmp_path, input__keep="null")
    publish_first_row(arguments, second.name)

    # Rewritten once it was listed, before it is read.
    command = [sys.executable, "-m", "jobs.cli", "run", SPEC, *arguments]
    env = environment(RAY_ADDRESS=ray_address)
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while "starting Ray" not in process.stderr.readline():
            assert process.poll() is None
        second.write_bytes(new.read_bytes())
        said = process.stderr.read()
    told = said.splitlines()[-1]
    assert process.returncode == 3 and told.startswith(
        f"tessera: 1 shard failed: {second} changed while it was"
    ), said
    assert "the same command captions it anew" in told and "repair" not in told
    assert sorted(path.name for path in (out / "data").iterdir()) == ["part-00000.parquet"]
    assert not (out / "_SUCCESS").exists() and not list((out / JOURNAL).rglob("*.parquet"))

    # The same command captions the new version, and not the shard that was only touched.
    os.utime(first)
    done = tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address)
    assert done.code == 0 and "10 rows" in done.out and "6 of them now" in done.out, done.err
    assert "comparing 1 shards" in done.err and column(out / "data" / second.name, "id") == column(new, "id")
    assert "old" not in column(out / "data" / second.name, "caption")

    # A shard with a column more, and one that was rewritten for good: both are asked about.
    pq.write_table(
        pq.read_table(new).append_column("more", pa.array(["x"] * 6)), tmp_path / "in/part-00002.parquet"
    )
    pq.write_table(pq.read_table(new).slice(1), first)
    refused = tessera("run", SPEC, *arguments)
    assert refused.code == 2 and "(more only in some: part-00002.parquet)" in refused.err, refused.err
    assert "set input.keep to columns that all have, for instance [id, prompt, truth]" in refused.err
    arguments.append("--set=input.keep=[id, prompt, truth]")
    refused = tessera("run", SPEC, *arguments)
    assert refused.code == 2 and "4 of the 10 rows captioned would be captioned again" in refused.err, (
        refused.err
    )
    assert "(part-00000.parquet)" in refused.err and "--recaption-changed" in refused.err
    done = tessera("run", SPEC, *arguments, "--recaption-changed", RAY_ADDRESS=ray_address)
    assert done.code == 0 and "17 rows" in done.out and "11 of them now" in done.out, done.err
    assert tessera("verify", out).code == 0

    more = tessera("run", SPEC, *arguments, f"--set=input.path=[{tmp_path / 'in'}, {tmp_path / 'new'}]")
    assert more.code == 2 and f"input.path: {tmp_path / 'new'} lies outside of {tmp_path / 'in'}" in more.err


ODD = [
    "ünï/日本 語😀.parquet", "e\u0301/ lead.parquet", "100%/a%20b%2Fc.parquet", "q?x=1&y#z,+=@!~$HOME.parquet",
    "[x]/*?{b}.parquet", "a=1/p:2 quo'te\"s\\.parquet", "k" * 450 + "/" + "l" * 430 + ".parquet",
]  # fmt: skip
REFUSED = ["a//b.parquet", "a::b.parquet"]


def test_oddly_named_objects_are_captioned_or_named(s3_url, tmp_path, ray_address):
    file, client = io.BytesIO(), boto3.client("s3")
    image = pa.array([{"bytes": picture(), "path": None}])
    pq.write_table(pa.table({"image": image, "prompt": ["What?"]}), file)
    for name in (*ODD, *REFUSED):
        client.put_object(Bucket=s3_url[5:], Key=f"in/{name}", Body=file.getvalue())
    arguments = options(
        tmp_path, input__path=f"{s3_url}/in", output__path=f"{s3_url}/out", input__keep="null"
    )
    done = tessera("run", SPEC, *arguments, RAY_ADDRESS=ray_address)
    told = done.err.splitlines()[-1]
    assert done.code == 3 and f"{len(ODD)} rows" in done.out and "no errors" in done.out, done.err
    assert told.startswith("tessera: 2 shards failed: ") and all(
        f"/in/{name} has " in told for name in REFUSED
    )
    listed = client.list_objects_v2(Bucket=s3_url[5:], Prefix="out/data/")["Contents"]
    assert {item["Key"] for item in listed} == {f"out/data/{name}" for name in ODD}

    long = [*arguments, f"--set=output.path={s3_url}/{'o' * 200}"]
    refused = tessera("run", SPEC, *long)
    assert refused.code == 2 and "output.path: " in refused.err and "1,024 bytes" in refused.err, refused.err
