"""What an output's captions depend on: a checkpoint folder is known by its content, cheaply."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.ledger.identity import caption_fields, identity_record, mismatch, weights_fingerprint
from pipeline.spec.job_spec import parse_spec


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a config and 12 MiB of weights in three tensors."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "fuyu"}')
    (folder / "README.md").write_text("a model")
    tensors = {f"layer.{n}": np.full(1 << 20, n, np.float32) for n in range(3)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_content_counts_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    before = weights_fingerprint(str(checkpoint))
    assert len(before) == 16
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")  # with other modification times
    (copy / "README.md").write_text("the same model")
    assert weights_fingerprint(str(copy)) == before


@pytest.mark.parametrize("layer", range(3))
def test_a_fine_tune_of_one_layer_tells(checkpoint: Path, layer: int) -> None:
    before = weights_fingerprint(str(checkpoint))
    tensors = {f"layer.{n}": np.full(1 << 20, n + 0.1 * (n == layer), np.float32) for n in range(3)}
    save_file(tensors, checkpoint / "model.safetensors")
    assert weights_fingerprint(str(checkpoint)) != before


def test_every_other_file_models_read_counts_whole(checkpoint: Path) -> None:
    seen = {weights_fingerprint(str(checkpoint))}
    (checkpoint / "config.json").write_text('{"model_type": "aria"}')
    seen.add(weights_fingerprint(str(checkpoint)))
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(weights_fingerprint(str(checkpoint)))
    (checkpoint / "old.bin").write_bytes(bytes(9 << 20))
    seen.add(weights_fingerprint(str(checkpoint)))
    (checkpoint / "old.bin").write_bytes(bytes(8 << 20) + bytes([1]) * (1 << 20))
    seen.add(weights_fingerprint(str(checkpoint)))
    assert len(seen) == 5


@pytest.mark.parametrize("begin", [b"\xff" * 8, bytes(8), (4).to_bytes(8, "little") + b"[{}]"])
def test_a_damaged_file_that_no_model_is_read_from_counts(checkpoint: Path, begin: bytes) -> None:
    before = weights_fingerprint(str(checkpoint))
    (checkpoint / "consolidated.safetensors").write_bytes(begin + bytes(9 << 20))
    damaged = weights_fingerprint(str(checkpoint))
    (checkpoint / "consolidated.safetensors").write_bytes(begin + bytes([1]) * (9 << 20))
    assert len({before, damaged, weights_fingerprint(str(checkpoint))}) == 3


def test_a_hub_checkpoint_is_its_id_and_a_folder_its_files(checkpoint: Path) -> None:
    def fields(path: str) -> dict[str, Any]:
        spec = parse_spec({"input": {"path": "in"}, "model": {"path": path}, "output": {"path": "out"}})
        assert Path(identity_record(spec)["spec"]["input"]["path"][0]).is_absolute()
        return caption_fields(spec)

    hub = fields("org/model")
    assert hub["model.path"] == "org/model" and "model.weights" not in hub and hub["tessera.captions"] >= 1
    local = fields(str(checkpoint))
    assert local["model.weights"] == weights_fingerprint(str(checkpoint)) and "model.path" not in local
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "aria"}))
    refused = mismatch("out", local, fields(str(checkpoint)))
    assert refused and "the files of the checkpoint folder" in refused and "output.path" in refused
    refused = mismatch("out", {**hub, "tessera.captions": 0}, hub)
    assert refused and "tessera.captions (0 there, " in refused and "version of Tessera's prompts" in refused
    assert mismatch("out", hub, dict(hub)) is None


def test_an_output_in_another_format_is_refused_and_not_captioned_again():
    now = {"tessera.format": 2}
    said = mismatch("out", {}, now)
    assert said and "tessera.format (null there, 2 here)" in said and "the captions are whole" in said


def test_kept_columns_are_compared_as_a_set() -> None:
    def fields(keep: list[str] | None) -> dict[str, Any]:
        sections = {"model": {"path": "org/model"}, "output": {"path": "out"}}
        return caption_fields(parse_spec({"input": {"path": "in", "keep": keep}, **sections}))

    assert mismatch("out", fields(["id", "title"]), fields(["title", "id"])) is None
    refused = mismatch("out", fields(["id", "title"]), fields(["id"]))
    assert refused and 'input.keep (["id", "title"] there, ["id"] here)' in refused
