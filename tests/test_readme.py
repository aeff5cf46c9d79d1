"""The README, word for word: its commands are run, its spec is the spec, its snippets work."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.spec.job_spec import parse_spec
from tests.commands import BIN, ROOT, environment

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def output(snippet: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(snippet, {})
    return said.getvalue()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project, so that what the README writes lands elsewhere."""
    kept = ("pipeline", "actors", "jobs", "examples")
    for name in kept:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "tessera").write_text(f'#!/bin/sh\nexec {sys.executable} -m jobs.cli "$@"\n')
    (programs / "tessera").chmod(0o755)
    return tmp_path


@pytest.mark.timeout(900)
def test_every_command_works_in_the_order_given(project, dashboard, monkeypatch):
    path = os.pathsep.join([str(project / "bin"), str(BIN), os.environ["PATH"]])
    env = environment(PATH=path, PYTHONPATH=str(project))
    env.pop("RAY_ADDRESS", None)
    ran = [line for line in commands() if not line.startswith("make ")]
    assert len(ran) >= 6
    for line in ran:
        command = line.replace("http://127.0.0.1:8265", dashboard)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=project,
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (project / "out/x/_SUCCESS").exists() and (project / "out/submitted/_SUCCESS").exists()
    assert "data:image/" in (project / "out/x.html").read_text()

    monkeypatch.chdir(project)
    (project / "photos/deep").mkdir(parents=True)
    shutil.copy(ROOT / "examples/toy/scene.png", project / "photos/deep/scene.jpg")
    said = [output(snippet) for snippet in blocks("python")]
    assert len(said) == 3
    pictures = pq.read_table(project / "images/part-00000.parquet").to_pylist()
    assert pictures == [{"name": "scene.jpg", "image": (ROOT / "examples/toy/scene.png").read_bytes()}]
    assert "decode" in said[1]
    assert said[2] == "a yellow square left of a purple square on a gray background\n"


def test_make_has_the_targets_named():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE))
    assert {"demo", "test", "lint"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_spec_is_complete_and_shows_the_defaults():
    (text,) = blocks("yaml")
    shown = yaml.safe_load(text)
    spec = parse_spec(shown)
    required = {"input": {"path": "in"}, "model": {"path": "m"}, "output": {"path": "out"}}
    assert set(fields(spec.model_dump())) == set(fields(shown))
    defaults, given = fields(parse_spec(required).model_dump()), fields(spec.model_dump())
    for name in given:
        if name not in ("name", "input.path", "model.path", "output.path"):
            assert given[name] == defaults[name], name


def test_what_it_links_to_is_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def fields(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= fields(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
