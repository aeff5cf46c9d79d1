"""The device's benchmark, on the device that every machine has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine.engine import ContinuousEngine
from benchmarks import device
from benchmarks.device_meter import DECODE, PREFILL, Demand, Meter, Rates
from benchmarks.device_profile import StepProfiler
from benchmarks.device_report import Report
from benchmarks.engine_models import build
from benchmarks.engine_systems import run_engine
from benchmarks.engine_workloads import rows

CPU = torch.device("cpu")
TOY = ["--device", "cpu", "--size", "toy", "--rows", "3", "--rounds", "1"]


def _run(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[str, dict[str, Any]]:
    """What the command prints, and its JSON."""
    device.main([*TOY, "--out", str(folder), *arguments])
    said = capsys.readouterr().out
    return said, json.loads(said.splitlines()[-1])


def test_each_line_is_in_the_report_and_the_last_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, result = _run(
        ["--families", "aria", "--parts", "proof,engine", "--commit", "abc"], tmp_path, capsys
    )
    (report,) = tmp_path.glob("device-*.md")
    assert report.read_text() == said
    assert result["benchmark"] == "device" and result["commit"] == "abc" and result["rounds"] == 1
    assert result["proof"]["models"].keys() == {"aria toy"}
    assert result["proof"]["models"] == result["engine"]["models"]
    lines = result["engine"]["rows"]
    assert {(line["workload"], line["system"].split()[0]) for line in lines} == {
        (workload, system)
        for workload in ("decode-heavy", "prefill-heavy")
        for system in ("tessera", "generate")
    }
    for line in lines:
        assert line["tokens_per_s"] > 0 and line["rows"] == 3
        if line["system"] == "tessera":
            assert line["times_generate"] > 0 and 0 < line["encoding"] < 1
            assert line["prefill_mfu"] > 0 and line["decode_bandwidth"] is None  # a mixture of experts
    assert sum(row.startswith("| aria | toy |") for row in said.splitlines()) == 4


def test_no_model_starts_when_the_time_is_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, result = _run(["--parts", "engine", "--budget", "0.001"], tmp_path, capsys)
    assert result["engine"]["rows"] == [] and len(result["engine"]["left_out"]) == 4
    assert "llava_onevision toy is not begun: the time is nearly spent" in said and "left out: llava" in said


def test_a_model_that_fails_takes_no_other_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = device.ModelBench

    def bench(family: str, *rest: Any) -> Any:
        if family == "llava_onevision":
            raise RuntimeError("no such kernel")
        return original(family, *rest)

    monkeypatch.setattr(device, "ModelBench", bench)
    said, result = _run(["--parts", "proof", "--families", "llava_onevision,fuyu"], tmp_path, capsys)
    assert result["proof"]["models"].keys() == {"fuyu toy"}
    assert "no such kernel" in said


def test_the_tests_of_the_device_need_no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is lent has none: the part `tests` collects them without it, and without the plugins that
    pyproject.toml names."""
    hidden = tmp_path / "hidden"
    for name in ("ray", "pydantic", "s3fs", "moto", "boto3", "rich", "pytest_timeout"):
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text("raise ModuleNotFoundError(__name__)")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    said = device._tests(Report(tmp_path / "report.md", None))
    assert "error" not in said and ("skipped" in said or "passed" in said)


def test_a_step_counts_whole_and_once(tmp_path: Path) -> None:
    family, model = build("aria", "toy", tmp_path, torch.float32, CPU)
    case = rows(family, "toy", "decode-heavy", 3)
    demand = Demand.of(model, family, case[0])
    engine = ContinuousEngine(family, model)
    with Meter(engine, demand) as meter:
        tokens = run_engine(engine)(case)
    assert {step.kind for step in meter.steps} == {PREFILL, DECODE}
    assert sum(step.seconds for step in meter.steps) <= meter.seconds
    assert sum(step.tiles for step in meter.steps) == sum(len(row.pixels) for row in case)
    # All that is generated but the first token of a row comes from a decoding token of a step.
    prompts = sum(len(row.token_ids) for row in case)
    computed = sum(step.rows for step in meter.steps if step.kind == DECODE)
    assert computed <= tokens - len(case) and prompts > computed
    assert engine.scheduler.plan.__self__ is engine.scheduler  # type: ignore[attr-defined]
    assert "embed_images" not in vars(family)
    rates = Rates(flops=1e15, bandwidth=1e12)
    assert 0 < meter.prefill_mfu(rates) < 1 and 0 < meter.decode_bandwidth(rates) < 1


def test_a_decoding_step_reads_the_output_layer_and_the_experts_it_meets(tmp_path: Path) -> None:
    family, model = build("aria", "toy", tmp_path, torch.float32, CPU)
    row = rows(family, "toy", "decode-heavy", 1)[0]
    demand = Demand.of(model, family, row)
    assert demand.share == 0.5 and demand.experts == 2 * 4 * (128 * 2 * 64 + 64 * 128)
    assert demand.head == 512 * 128
    parameters = sum(weight.numel() for weight in model.model.language_model.layers.parameters())
    many = demand.bytes_of_decoding([_decoding(position) for position in [0] * 64])
    seen = 64 * demand.work.shape.bytes_per_token
    assert many == pytest.approx(4 * (parameters + demand.head) + seen, rel=1e-6)
    assert demand.tile_flops > 0


def _decoding(position: int) -> Any:
    from types import SimpleNamespace

    from actors.engine.scheduler import Chunk

    sequence: Any = SimpleNamespace(prompt_length=0)
    return Chunk(sequence, position, 1)


def test_steps_are_profiled_where_they_come_in_a_row(tmp_path: Path) -> None:
    family, model = build("llava_onevision", "toy", tmp_path, torch.float32, CPU)
    case = rows(family, "toy", "decode-heavy", 3)
    demand = Demand.of(model, family, case[0])
    engine = ContinuousEngine(family, model)
    profiler = StepProfiler(CPU)
    with Meter(engine, demand, profiler):
        run_engine(engine)(case)
    profiler.close()
    decode = profiler.profiled[DECODE]
    assert decode.steps == 12 and decode.fewest <= decode.most <= 3
    assert "aten::" in decode.table
