"""The demo, whole: the example jobs of all four families, through Ray, to captions that are true."""

import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from examples.demo import FAMILIES
from tests.commands import ROOT, environment

ROWS, SHARDS, CORRUPT = 200, 4, 10


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    env = environment()
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "examples.demo", "--out", str(out), "--rows", str(ROWS)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.timeout(700)
@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_true_in_input_order_and_corrupt_rows_are_decode_errors(demo, family):
    out, _ = demo
    right = 0
    for shard in range(SHARDS):
        source = pq.read_table(out / "data" / family / f"part-{shard:05d}.parquet")
        sealed = pq.read_table(out / family / "data" / f"part-{shard:05d}.parquet")
        assert sealed["id"] == source["id"] and sealed["truth"] == source["truth"]
        right += sum(row["caption"] == row["truth"] for row in sealed.to_pylist())
    rows = pq.read_table(out / family / "data").to_pylist()
    errors = [row["error"]["kind"] for row in rows if row["error"]]
    assert len(rows) == ROWS and errors == ["decode"] * CORRUPT
    assert right >= 0.95 * (ROWS - CORRUPT)


def test_aya_answers_in_the_prompts_language(demo):
    out, _ = demo
    rows = pq.read_table(out / "aya_vision" / "data").to_pylist()
    captions = [row["caption"] for row in rows if row["caption"]]
    for word in (" on a ", " sobre un ", " sur un "):
        assert sum(word in caption for caption in captions) >= 50


def test_the_summary_and_the_page_name_every_job(demo):
    out, printed = demo
    page = (out / "report.html").read_text()
    for family in FAMILIES:
        name = f"toy-{family.replace('_', '-')}"
        assert name in printed and name in page
    assert page.count("data:image/") >= 4 * 30
    assert "http://" not in page and "https://" not in page
