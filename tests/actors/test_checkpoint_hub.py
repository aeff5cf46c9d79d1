"""What is wrong with a hub id is told in seconds and truly, by the real client: the name, the access, or the hub."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import untrained
from tests.commands import ROOT, environment
from tests.hub import COMMIT, Hub, serving

# The client reads HF_ENDPOINT when it is imported, so it asks from a process of its own.
ASK = """
import json, os, sys
from actors.checkpoint_files import CheckpointError
from actors.checkpoint_hub import find_checkpoint
answers = []
for path, revision in json.loads(sys.argv[1]):
    try:
        answers.append(["found", find_checkpoint(path, revision)])
    except CheckpointError as error:
        answers.append([type(error).__name__, str(error)])
assert not {"torch", "transformers"} & set(sys.modules)
print(json.dumps(answers))
"""

LOAD = """
import sys
from actors.families import CheckpointError, load_family
try:
    print(load_family(sys.argv[1]).name)
except CheckpointError as error:
    print(error)
"""


def ask(home: Path, *ids: str, revision: str | None = None, **extra: str) -> list[list[str]]:
    """[what came of it, message] of each hub id; nothing else may be said aloud."""
    command = [sys.executable, "-c", ASK, json.dumps([(path, revision) for path in ids])]
    env = environment(HF_HOME=str(home), **extra)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    answers: list[list[str]] = json.loads(done.stdout)
    return answers


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """Serves a whole checkpoint twice, one without its weights, and an empty repository."""
    whole = Path(untrained("llava_onevision"))
    bare, empty = tmp_path / "bare", tmp_path / "empty"
    bare.mkdir()
    empty.mkdir()
    (bare / "config.json").write_bytes((whole / "config.json").read_bytes())
    (bare / "model.gguf").write_bytes(b"for another program")
    return Hub({"org/model": whole, "org/blip": whole, "org/bare": bare, "org/empty": empty})


@pytest.fixture
def endpoint(hub: Hub) -> Iterator[str]:
    with serving(hub) as url:
        yield url


def test_a_checkpoint_is_found_and_its_weights_are_left_there(
    hub: Hub, endpoint: str, tmp_path: Path
) -> None:
    assert ask(tmp_path, "org/model", "org/blip", HF_ENDPOINT=endpoint) == [
        ["found", "org/model"],
        ["found", "org/blip"],
    ]
    assert hub.asked["HEAD", "org/model", "model.safetensors"] == 1
    downloaded = {(path, name) for method, path, name in hub.asked if method == "GET" and path in hub.folders}
    assert downloaded == {("org/model", "config.json"), ("org/blip", "config.json")}


def test_its_family_is_loaded_from_the_hub(endpoint: str, tmp_path: Path) -> None:
    env = environment(HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint)
    loaded, refused = (
        subprocess.check_output([sys.executable, "-c", LOAD, path], cwd=ROOT, env=env, text=True, timeout=60)
        for path in ("org/model", "org/bare")
    )
    assert loaded == "llava_onevision\n"
    assert refused == "org/bare: no tokenizer there: none of tokenizer.json, tokenizer.model, vocab.json\n"


def test_each_refusal_has_its_sentence(endpoint: str, tmp_path: Path) -> None:
    spec = {
        "org/gone": f"no such folder here, and {endpoint} has no such checkpoint, or a private one: "
        "check the name, or set HF_TOKEN",
        "org/gated": f"{endpoint} gives this gated checkpoint to accounts with access only; "
        f"ask for access at {endpoint}/org/gated, and set HF_TOKEN",
        "org/disabled": f"{endpoint} refuses it (403 Forbidden: Access to this resource is disabled.); "
        "check its page, and HF_TOKEN",
        "org/forbidden": f"{endpoint} refuses it (403 Forbidden: Please enable access to public gated "
        "repositories.); check its page, and HF_TOKEN",
        "org/empty": "no config.json there, so it is not a checkpoint",
        "org/bare": "no weights there that transformers loads (model.safetensors, "
        "model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json)",
    }
    answers = ask(tmp_path, *spec, HF_ENDPOINT=endpoint)
    assert answers == [["CheckpointError", f"{path}: {message}"] for path, message in spec.items()]
    assert ask(tmp_path, "org/model", revision="v9", HF_ENDPOINT=endpoint) == [
        [
            "CheckpointError",
            f"org/model: {endpoint} has no revision 'v9' of it; "
            "set model.revision to a branch, a tag or a commit, or leave it out",
        ]
    ]


def test_a_hub_that_fails_is_no_fault_of_the_job(hub: Hub, endpoint: str, tmp_path: Path) -> None:
    busy, limited = ask(tmp_path, "org/busy", "org/limited", HF_ENDPOINT=endpoint)
    why = f"no such folder here, and {endpoint} fails to answer"
    assert busy == ["HubError", f"org/busy: {why} (503 Service Unavailable); try again later"]
    assert limited == ["HubError", f"org/limited: {why} (429 Too Many Requests); try again later"]
    assert hub.asked["HEAD", "org/busy", "config.json"] == 2


def test_the_cache_serves_where_the_hub_does_not(hub: Hub, tmp_path: Path) -> None:
    with serving(hub) as endpoint:
        ask(tmp_path, "org/model", HF_ENDPOINT=endpoint)
        cached = tmp_path / "hub/models--org--model/snapshots" / COMMIT
        assert (cached / "config.json").exists()
    for network in ({"HF_ENDPOINT": endpoint}, {"HF_HUB_OFFLINE": "1"}):
        assert ask(tmp_path, "org/model", **network) == [["found", str(cached)]]
    unreachable, offline = (
        ask(tmp_path, "org/other", **network)
        for network in ({"HF_ENDPOINT": endpoint}, {"HF_HUB_OFFLINE": "1"})
    )
    assert unreachable == [
        [
            "HubError",
            f"org/other: no such folder here, and the hub cannot be reached at {endpoint} "
            "([Errno 111] Connection refused); check the network, or name a local folder",
        ]
    ]
    assert offline == [
        [
            "HubError",
            f"org/other: no such folder here, and not in the cache at {tmp_path / 'hub'}; "
            "HF_HUB_OFFLINE is set: unset it, or download the checkpoint first",
        ]
    ]


def test_an_id_that_is_nearly_a_folder(tmp_path: Path) -> None:
    ((kind, message),) = ask(tmp_path, "example/toy", HF_HUB_OFFLINE="1")
    assert kind == "HubError"
    assert message.startswith(
        "example/toy: no such folder here (did you mean examples/toy?), and not in the cache"
    )
