"""docs/architecture.md, executed: the tour runs, and every file and symbol that it names exists."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from tests.commands import ROOT

PAGE = ROOT / "docs" / "architecture.md"
NAMED = re.findall(r"`([\w/]+)\.py` ?\(`([\w.]+)`\)|`([\w/]+)\.py`, `([\w.]+)`", PAGE.read_text())


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(
        str(PAGE), module_relative=False, globs={"ROOT": ROOT}, optionflags=doctest.FAIL_FAST
    )
    assert tried > 20 and not failed


@pytest.mark.parametrize(("file", "symbol"), [(a or c, b or d) for a, b, c, d in NAMED])
def test_what_it_names_is_there(file: str, symbol: str) -> None:
    found = importlib.import_module(file.replace("/", "."))
    for name in symbol.split("."):
        found = getattr(found, name)


def test_every_room_is_on_the_page() -> None:
    rooms = {
        str(path.parent.relative_to(ROOT))
        for package in ("pipeline", "actors")
        for path in (ROOT / package).rglob("__init__.py")
    }
    named = set(re.findall(r"^\| `([\w/]+)/`", PAGE.read_text(), flags=re.MULTILINE))
    leaves = {"actors/engine/devices/cpu", "actors/engine/devices/cuda", "pipeline", "actors"}
    assert named == rooms - leaves
