"""The engine's benchmarks run, print their table and end in one line of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.engine.devices.kv_cache import KVShape
from actors.engine.engine import ContinuousEngine
from actors.engine.scheduler import Chunk
from actors.families import FAMILIES
from benchmarks import engine, engine_roofline, engine_soak
from benchmarks.engine_models import build
from benchmarks.engine_workloads import rows


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


def test_no_utilisation_exceeds_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not even where the machine gives nothing while its peak is measured."""
    monkeypatch.setattr(engine_roofline, "seconds_of", lambda run: 1000.0)
    cpu = torch.device("cpu")
    family, stock = build("aya_vision", "toy", tmp_path, torch.float32, cpu)
    served = ContinuousEngine(*build("aya_vision", "toy", tmp_path, torch.float32, cpu))
    use = engine_roofline.utilisation(served, stock, rows(family, "toy", "decode-heavy", 3))
    assert 0 < use["prefill_mfu"] <= 1 and 0 < use["decode_bandwidth"] <= 1


def test_operations_are_counted_where_they_are_needed() -> None:
    shape = KVShape(layers=3, heads=1, head_dim=4, dtype=torch.float32)
    work = engine_roofline.Work(100, 50, (None, 2, None), 8, shape)
    sequence: Any = SimpleNamespace(prompt_length=5)
    whole, part = Chunk(sequence, 0, 5), Chunk(sequence, 1, 3)
    # All layers' attention but the last one's for every token, that one's and its feed-forward block for one token.
    assert work.flops(whole) == 2 * (5 * 100 + 50) + 4 * 8 * ((1 + 2 + 3 + 4 + 5) + (1 + 2 + 2 + 2 + 2) + 5)
    assert work.flops(part) == 2 * 3 * 100 + 4 * 8 * ((2 + 3 + 4) + (2 + 2 + 2))
    assert work.bytes_of_decoding([Chunk(sequence, 6, 1)]) == 150 * 4 + (7 + 2 + 7) * 2 * 4 * 4
