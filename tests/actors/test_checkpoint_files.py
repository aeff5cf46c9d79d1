"""A checkpoint's path and weight files are checked as transformers would load them; every refusal names the file."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from actors.checkpoint_files import CheckpointError, check_path
from tests.checkpoints import untrained


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(untrained("llava_onevision"))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A copy of a checkpoint with one file of weights."""
    return shutil.copytree(untrained("llava_onevision"), tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path, model: PreTrainedModel) -> Path:
    """A checkpoint in several shards with an index, as transformers saves it."""
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    return tmp_path / "sharded"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def refusal(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as refused:
        check_path(str(folder))
    message = str(refused.value)
    assert message.startswith(f"{folder}: ") and "\n" not in message
    return message.removeprefix(f"{folder}: ")


def loads(folder: Path) -> bool:
    """Whether transformers itself loads the weights, without making any up."""
    try:
        _, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    except Exception:
        return False
    return not loading["missing_keys"]


def test_whole_checkpoints_pass(single: Path, sharded: Path, model: PreTrainedModel) -> None:
    check_path(str(single))
    assert len(shards(sharded)) > 2
    check_path(str(sharded))
    (single / "model.safetensors").unlink()
    torch.save(model.state_dict(), single / "pytorch_model.bin")
    check_path(str(single))
    torch.save(model.state_dict(), single / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    check_path(str(single))


@pytest.mark.parametrize("kept", [0, 5, 500, 100_000, -1])
def test_a_truncated_file_is_named(single: Path, kept: int) -> None:
    weights = single / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert not loads(single)
    size = weights.stat().st_size
    assert refusal(single).startswith(f"model.safetensors is truncated or damaged ({size:,} bytes: ")


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    broken = shards(sharded)[1]
    os.truncate(broken, broken.stat().st_size - 1)
    assert refusal(sharded).startswith(f"{broken.name} is truncated or damaged (")


def test_a_truncated_bin_is_named(single: Path, model: PreTrainedModel) -> None:
    (single / "model.safetensors").unlink()
    weights = single / "pytorch_model.bin"
    torch.save(model.state_dict(), weights)
    os.truncate(weights, weights.stat().st_size - 1000)
    assert not loads(single)
    assert refusal(single).startswith("pytorch_model.bin is truncated or damaged (")
    weights.write_text("<html>Not found</html>")
    assert "neither a zip archive nor a pickle" in refusal(single)


def test_missing_shards_are_named(sharded: Path) -> None:
    first, second, *rest = shards(sharded)
    second.unlink()
    assert not loads(sharded)
    index = f"of the {2 + len(rest)} files that model.safetensors.index.json lists"
    assert refusal(sharded).startswith(f"{second.name} is missing, {index}")
    first.unlink()
    assert refusal(sharded).startswith(f"{first.name} and 1 more are missing, {index}")


def test_no_weights_at_all(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    assert not loads(single)
    assert refusal(single).startswith("no weights there that transformers loads (model.safetensors, ")


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "b"}}'])
def test_a_broken_index_is_named(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    assert not loads(sharded)
    assert refusal(sharded).startswith("model.safetensors.index.json ")


def test_tensors_that_the_index_lists_and_no_file_holds(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    shard = shards(sharded)[0]
    lost = min(name for name, file in places.items() if file == shard.name)
    save_file({"another": np.zeros(3, np.float32)}, shard, {"format": "pt"})
    assert not loads(sharded)
    assert refusal(sharded) == f"{index.name} lists {lost}, which none of its files holds"


def test_a_second_set_of_weights_is_refused(single: Path, sharded: Path) -> None:
    """transformers would take model.safetensors, however stale, and leave fresh shards alone without a word."""
    stale = shutil.copy(single / "model.safetensors", sharded)
    first, *rest = shards(sharded)
    assert refusal(sharded) == (
        f"{first.name} and {len(rest)} more are there, but transformers loads only what model.safetensors holds; "
        "remove the weights that are not meant"
    )
    os.remove(stale)
    shutil.copy(first, sharded / "model-00001-of-00099.safetensors")
    assert refusal(sharded).startswith(
        "model-00001-of-00099.safetensors is there, but transformers loads only what model.safetensors.index.json lists"
    )


def test_what_loading_ignores_is_no_fault(single: Path, sharded: Path) -> None:
    """Other formats for other programs, and the index that transformers leaves when it saves one file over shards."""
    shutil.copy(sharded / "model.safetensors.index.json", single)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "adapter_model.safetensors"):
        (single / name).write_bytes(b"for something else")
    assert loads(single)
    check_path(str(single))


def test_git_lfs_pointers_are_told(single: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1724400\n"
    (single / "model.safetensors").write_text(pointer)
    assert refusal(single) == (
        "model.safetensors is a Git LFS pointer, not the file itself; run `git lfs pull` there"
    )
    (single / "config.json").write_text(pointer)
    assert refusal(single).startswith("config.json is a Git LFS pointer")


def test_the_file_that_config_names(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "transformers_weights": "best.safetensors"}))
    assert refusal(single) == "no weights there that transformers loads (best.safetensors)"
    (single / "model.safetensors").rename(single / "best.safetensors")
    assert loads(single)
    check_path(str(single))


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "no config.json there, so it is not a checkpoint"
    file = tmp_path / "model.safetensors"
    file.touch()
    assert refusal(file) == "a file; name the checkpoint's folder, or a hub id"


def test_mistyped_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/llava/ov").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in ("./ckpt", "../ckpt", "~nobody/ckpt", str(tmp_path / "nowhere"), "a/b/c", "org/", "org/a b"):
        assert refusal(path) == "no such folder, and not a hub id (organisation/name)"
    assert refusal("modles/lava/ov").startswith(
        "no such folder (did you mean models/llava/ov?), and not a hub"
    )
    wrong, right = tmp_path / "models/lava", tmp_path / "models/llava"
    assert refusal(wrong).startswith(f"no such folder (did you mean {right}?), and not a hub id")
    assert refusal("s3://bucket/llava").startswith(
        "no such folder (only local folders are read), and not a hub"
    )
    for path in ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "gpt2", "modles/llava"):  # the hub knows
        check_path(path)
