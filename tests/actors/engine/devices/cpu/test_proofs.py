"""A CPU's fast paths are used once they agree with the exact ones: compiled attention and experts, packed layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import which

import pytest
import torch
from torch import Tensor

from actors.engine.devices.cpu import kernels, layers
from actors.engine.devices.cpu.layers import PackedGatedMLP, RMSNorm
from actors.engine.engine import ContinuousEngine
from actors.families import load_model
from tests.actors.engine.subjects import subject
from tests.actors.engine.test_parity import assert_equal, pool, run

Lie = Callable[[Tensor], Tensor]


def lies(found: Tensor) -> Tensor:
    return found.add_(0.3)


def nan(found: Tensor) -> Tensor:
    return found.fill_(float("nan"))


def raises(found: Tensor) -> Tensor:
    raise OSError("illegal instruction")


LIES = pytest.mark.parametrize(
    ("lie", "why"), [(lies, "differed by"), (nan, "differed by nan"), (raises, "illegal instruction")]
)


def engine_of(family: str) -> ContinuousEngine:
    one = subject(family)
    return ContinuousEngine(one.family, one.own_model())


def bend(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, lie: Lie) -> None:
    right = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda *given, **named: lie(right(*given, **named)))


def test_all_of_them_prove_themselves() -> None:
    record = engine_of("aria").record
    assert (record.attention, record.layers, record.experts) == ("compiled", "packed", "compiled")
    assert record.why == () and record.graphs == "none"


@LIES
@pytest.mark.parametrize("method", ["decode", "attend"])
def test_attention_that_lies_is_torch_s(
    method: str, lie: Lie, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bend(monkeypatch, kernels.AttentionKernel, method, lie)
    engine = engine_of("llava_onevision")
    assert engine.record.attention == "sdpa" and why in engine.record.why[0]
    rows = pool("llava_onevision")[:4]
    assert_equal("llava_onevision", rows, run(engine, "llava_onevision", rows))


@LIES
def test_experts_that_lie_are_the_models_own(lie: Lie, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bend(monkeypatch, kernels.ExpertsKernel, "__call__", lie)
    engine = engine_of("aria")
    assert engine.record.experts == "loop" and why in " ".join(engine.record.why)
    rows = pool("aria")[:4]
    assert_equal("aria", rows, run(engine, "aria", rows))


@LIES
@pytest.mark.parametrize("kind", [PackedGatedMLP, RMSNorm])
def test_layers_that_lie_stay_stock(kind: type, lie: Lie, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bend(monkeypatch, kind, "forward", lie)
    engine = engine_of("llava_onevision")
    assert engine.record.layers == "packed" and why in " ".join(engine.record.why)
    assert not any(isinstance(module, kind) for module in engine.runner.model.modules())
    rows = pool("llava_onevision")[:4]
    assert_equal("llava_onevision", rows, run(engine, "llava_onevision", rows))


def test_without_a_compiler_or_operators_all_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("cc")

    monkeypatch.setattr(kernels, "_compile", missing)
    monkeypatch.setattr(layers, "_available", lambda: False)
    kernels.attention_kernel.cache_clear()
    kernels._experts_library.cache_clear()
    try:
        engine = engine_of("aria")
    finally:
        kernels.attention_kernel.cache_clear()
        kernels._experts_library.cache_clear()
    record = engine.record
    assert (record.attention, record.layers, record.experts) == ("sdpa", "stock", "loop")
    assert "no C compiler" in record.why[0] and len(record.why) == 3
    rows = pool("aria")[:4]
    assert_equal("aria", rows, run(engine, "aria", rows))


@pytest.mark.skipif(which("cc") is None, reason="needs a C compiler")
def test_bfloat16_takes_the_fast_paths_and_float16_says_that_it_does_not() -> None:
    one = subject("aria")
    record = ContinuousEngine(one.family, one.own_model().to(torch.bfloat16)).record
    assert (record.attention, record.layers, record.experts) == ("compiled", "packed", "compiled")
    assert not record.why
    record = ContinuousEngine(one.family, one.own_model().to(torch.float16)).record
    assert (record.attention, record.layers, record.experts) == ("sdpa", "stock", "loop")
    assert "none in float16" in record.why[0] and "no such dtype" in " ".join(record.why)


def test_a_checkpoint_in_float16_computes_in_float32_and_says_so(tmp_path: Path) -> None:
    one = subject("fuyu")
    one.own_model().to(torch.float16).save_pretrained(tmp_path)
    record = ContinuousEngine(one.family, load_model(str(tmp_path))).record
    assert record.dtype == "float32"
    assert record.why == ("dtype: a CPU has no fast path in float16, and float32 holds the same values",)
