"""What is told and kept of the engines of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

from actors.engine.types import EngineRecord
from pipeline.run.engines import Engines, from_plain, to_plain, told

FAST = EngineRecord(
    engine="continuous",
    device="NVIDIA H100 80GB HBM3",
    dtype="bfloat16",
    threads=8,
    attention="flash",
    layers="fused",
    experts="none",
    graphs="256",
)
SLOW = replace(FAST, attention="gathered", why=("attention: flash differed by 0.3 of 2 at 4 sequences",))
ENGINE = (
    "engine: continuous on NVIDIA H100 80GB HBM3, bfloat16, 8 threads; "
    "attention flash, layers fused, experts none, graphs 256"
)
BECAUSE = "attention: gathered, because flash differed by 0.3 of 2 at 4 sequences"


def test_a_record_survives_json() -> None:
    assert from_plain(json.loads(json.dumps(to_plain(SLOW)))) == SLOW


def test_an_engine_is_told_once_with_what_stood_against_its_fastest_paths() -> None:
    engines = Engines()
    assert engines.add([SLOW, SLOW]) == [ENGINE.replace("flash", "gathered"), BECAUSE]
    assert engines.add([SLOW]) == []
    assert engines.add([FAST]) == [ENGINE]
    assert engines.add([]) == []


def test_engines_that_are_alike_are_one_in_the_record() -> None:
    engines = Engines()
    assert engines.record() == {}
    engines.add([FAST, FAST])
    record = json.loads(json.dumps(engines.record()))
    assert record == {"engine": {**to_plain(FAST), "replicas": 2}}
    assert told(record) == [ENGINE]


def test_engines_that_differ_have_a_count_each_the_most_first() -> None:
    engines = Engines()
    engines.add([SLOW, FAST, FAST])
    record = json.loads(json.dumps(engines.record()))
    assert record["engine"]["replicas"] == 2 and record["engine"]["attention"] == "flash"
    assert [other["attention"] for other in record["other_engines"]] == ["gathered"]
    assert told(record) == [
        ENGINE.replace("engine: ", "engine: 2 replicas: "),
        ENGINE.replace("engine: ", "engine: 1 replica: ").replace("flash", "gathered"),
        BECAUSE,
    ]


def test_a_reason_that_names_no_part_is_told_as_it_is() -> None:
    engines = Engines()
    assert engines.add([replace(FAST, why=("images: encoded alone",))])[1:] == ["images: encoded alone"]


def test_a_run_that_captioned_nothing_or_is_older_tells_nothing() -> None:
    assert told({"run": "r", "captioned": 0}) == []


def test_status_loads_no_torch() -> None:
    script = "import sys, pipeline.report.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
