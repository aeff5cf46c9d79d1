"""A device proves itself: a fast path is used only after it has agreed with the exact one, on that device and with the
model's own shapes.

Each part of the work (attention, layers, experts, graphs) has several paths, fastest first; the last is plain torch and
needs no proof. `choose` tries them in turn when an engine is built, before the first row. What fails, raises or yields
NaN is passed over, and why is kept for the run's record. No path ends the process but a device that is gone with it.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.engine.failures import describe, device_is_lost
from actors.engine.types import DeviceLost

log = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.004}
"""Of the largest exact value: some roundings of each dtype (2^-24, 2^-8, 2^-11), summed in another order. A wrong page,
mask or head differs by about the value itself."""

_REASON = 200
"""Characters of a reason: some of torch's lines name every backend it has."""


@dataclass(frozen=True, slots=True)
class Path:
    """One way to do a part of the work."""

    name: str
    prove: Callable[[], None] = lambda: None
    """Compares it with the exact path; raises where it disagrees or cannot run."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The path taken for a part of the work, and what stood against every faster one."""

    path: str
    why: str = ""


def choose(part: str, paths: Sequence[Path], device: torch.device) -> Choice:
    """The first of `paths` that proves itself; the last is the exact one. Raises DeviceLost where `device` is gone with
    an attempt."""
    against: list[str] = []
    for path in paths[:-1]:
        try:
            path.prove()
        except Exception as error:
            if device_is_lost(device):
                raise DeviceLost(describe(error)) from error
            against.append(f"{path.name}: {reason(error)}")
        else:
            return _chosen(part, path, against)
    return _chosen(part, paths[-1], against)


def check_close(found: Tensor, exact: Tensor, where: str) -> None:
    """Raises Disagrees where the two differ by more than their dtype rounds; NaN always does. `where` names the case,
    as in "at 4 sequences"."""
    if found.shape != exact.shape:
        raise Disagrees(f"has shape {tuple(found.shape)} for {tuple(exact.shape)} {where}")
    difference = (found.double() - exact.double()).abs().max().item()
    scale = max(exact.double().abs().max().item(), 1e-6)
    if not difference <= _TOLERANCE[exact.dtype] * scale:  # also where it is NaN
        raise Disagrees(f"differed by {difference:.2g} of {scale:.2g} {where}")


class Disagrees(ArithmeticError):
    """A fast path computes other values than the exact one."""


def _chosen(part: str, path: Path, against: Sequence[str]) -> Choice:
    choice = Choice(path.name, "; ".join(against))
    if against:
        log.warning("%s: %s, because %s", part, choice.path, choice.why)
    return choice


def reason(error: Exception) -> str:
    """One line: a proof's own words, or the error's."""
    text = str(error) if isinstance(error, Disagrees) else describe(error)
    return textwrap.shorten(text.splitlines()[0], _REASON) if text else type(error).__name__
