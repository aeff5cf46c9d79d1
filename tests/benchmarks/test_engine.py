"""The engine's benchmarks run, print their table and end in one line of JSON."""

from __future__ import annotations

import json

import pytest

from benchmarks import engine, engine_soak
from benchmarks.engine_models import FAMILIES


def test_every_family_and_system_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    engine.main(["--size", "toy", "--rows", "2", "--workloads", "decode-heavy"])
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["benchmark"] == "engine"
    found = {(row["family"], row["system"]) for row in result["rows"]}
    assert found == {
        (family, system) for family in FAMILIES for system in ("tessera", "generate", "pipeline")
    }
    assert len(table) == len(result["rows"])
    assert all(row["tokens_per_s"] > 0 for row in result["rows"])


def test_soak_serves_every_request(capsys: pytest.CaptureFixture[str]) -> None:
    engine_soak.main(["--requests", "40"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["served"] == 40
    assert result["cache_tokens_held"] == 0
