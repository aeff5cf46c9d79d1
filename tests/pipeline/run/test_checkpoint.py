"""A checkpoint on the hub is pinned: what an output was begun with, it is finished with, though the branch moves."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.ledger.ledger import Ledger, LedgerMismatch
from pipeline.run.checkpoint import moved, pinned
from pipeline.spec.job_spec import JobSpec, parse_spec
from tests.checkpoints import untrained
from tests.commands import ROOT, environment
from tests.hub import COMMIT, Hub, serving
from tests.pipeline.ledgers import captions

NEXT = "f" * 40

# The client reads HF_ENDPOINT when it is imported, so each look is a process of its own.
LOOK = """
import sys
from pipeline.ledger.ledger import Ledger, LedgerMismatch
from pipeline.run.checkpoint import moved, pinned
from pipeline.run.outcome import JobError
from pipeline.spec.job_spec import parse_spec
path, output, revision = sys.argv[1:]
ledger = Ledger(output)
asked = parse_spec(
    {"input": {"path": "in"}, "model": {"path": path, "revision": revision or None}, "output": {"path": output}}
)
try:
    spec = pinned(asked, ledger.bound_fields())
    ledger.bind(spec)
    print(spec.model.revision, moved(asked, spec))
except (JobError, LedgerMismatch) as error:
    print(type(error).__name__, error)
"""


def look(tmp_path: Path, endpoint: str, output: str = "out", revision: str = "") -> str:
    """What a run finds: the revision it is pinned to, and what it says of a branch that moved."""
    command = [sys.executable, "-c", LOOK, "org/model", str(tmp_path / output), revision]
    env = environment(HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=endpoint)
    return subprocess.check_output(command, cwd=ROOT, env=env, text=True, timeout=120).strip()


def test_a_branch_that_moves_does_not_mix_checkpoints(tmp_path: Path) -> None:
    hub = Hub({"org/model": Path(untrained("llava_onevision"))})
    with serving(hub) as endpoint:
        assert look(tmp_path, endpoint) == COMMIT
        Ledger(str(tmp_path / "out")).publish(captions("a.parquet", range(2)))
        hub.commits.append(NEXT)
        again = look(tmp_path, endpoint)
        assert again.startswith(f"{COMMIT} org/model has moved on to commit {NEXT[:12]}; this output goes on")
        assert "set output.path to a new folder" in again
        assert look(tmp_path, endpoint, "new") == NEXT
        refused = look(tmp_path, endpoint, revision="main")
        assert refused.startswith("LedgerMismatch") and f'model.revision ("{COMMIT}" there' in refused
        assert look(tmp_path, endpoint, revision=COMMIT) == COMMIT
    assert look(tmp_path, endpoint) == COMMIT  # without the hub, too
    assert look(tmp_path, endpoint, "other").startswith("JobError model.path: org/model: no such folder")


def spec_of(path: str, revision: str | None = None) -> JobSpec:
    model = {"path": path, "revision": revision}
    return parse_spec({"input": {"path": "in"}, "model": model, "output": {"path": "out"}})


def test_a_folder_and_a_commit_are_taken_as_they_are(tmp_path: Path) -> None:
    for spec in (spec_of(str(tmp_path)), spec_of("org/model", COMMIT)):
        assert pinned(spec, {}) == spec and moved(spec, spec) == ""
    assert pinned(spec_of("org/model"), {"model.path": "org/model", "model.revision": COMMIT}) == spec


def test_another_commit_is_another_checkpoint(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.bind(spec_of("org/model", COMMIT))
    ledger.publish(captions("a.parquet", range(2)))
    assert ledger.bound_fields()["model.revision"] == COMMIT
    with pytest.raises(LedgerMismatch, match=r"model\.revision"):
        ledger.check(spec_of("org/model", NEXT))
