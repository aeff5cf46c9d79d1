"""No fast path is taken that lies, raises or yields NaN; what stood against it is told."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from actors.engine.devices.proof import Path, check_close, choose
from actors.engine.types import DeviceLost

CPU = torch.device("cpu")
EXACT = torch.linspace(-3, 3, 64)


def path(name: str, compute: Callable[[], Tensor]) -> Path:
    return Path(name, lambda: check_close(compute(), EXACT, "at 4 sequences"))


def missing() -> Tensor:
    raise ImportError("no module named flash\nand a long story")


def lies() -> Tensor:
    return EXACT + 0.3


def nan() -> Tensor:
    return torch.where(EXACT > 2.9, float("nan"), EXACT)


@pytest.mark.parametrize(
    ("compute", "why"),
    [
        (lies, "fast: differed by 0.3 of 3 at 4 sequences"),
        (nan, "fast: differed by nan of 3 at 4 sequences"),
        (missing, "fast: ImportError: no module named flash"),
        (lambda: EXACT[:1], "fast: has shape (1,) for (64,) at 4 sequences"),
    ],
)
def test_what_lies_raises_or_is_nan_is_passed_over(compute, why, caplog):
    with caplog.at_level(logging.WARNING):
        choice = choose("attention", [path("fast", compute), Path("exact")], CPU)
    assert (choice.path, choice.why) == ("exact", why)
    assert caplog.messages == [f"attention: exact, because {why}"]


def test_the_first_that_agrees_is_taken_and_nothing_after_it_is_tried(caplog):
    paths = [path("wrong", lies), path("right", EXACT.clone), path("never", missing), Path("exact")]
    choice = choose("layers", paths, CPU)
    assert choice.path == "right" and choice.why.startswith("wrong: ")
    assert choose("layers", paths[1:], CPU).why == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_disagreement_and_a_neighbour_is(dtype):
    exact = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    check_close(exact.to(dtype), exact.to(dtype), "alike")
    rounded = (exact.to(dtype).double() * (1 + torch.finfo(dtype).eps)).to(dtype)
    check_close(rounded, exact.to(dtype), "rounded")
    with pytest.raises(ArithmeticError):
        check_close(exact.roll(1, 0).to(dtype), exact.to(dtype), "shifted")


def test_a_device_that_is_gone_ends_the_choice(monkeypatch):
    monkeypatch.setattr("actors.engine.devices.proof.device_is_lost", lambda device: True)
    with pytest.raises(DeviceLost):
        choose("graphs", [path("graphs", missing), Path("eager")], CPU)
