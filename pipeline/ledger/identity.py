"""What the captions of an output depend on, and the refusal of a run whose captions would differ.

Why: half an output captioned by one checkpoint and half by another is worse than none, and nobody notices. So the
first run writes down what its captions depend on, and every later one is compared with it, field by field.

Identity is made of content. Of a checkpoint on the hub, its id and commit stand for it: the revision of a spec that
comes here is pinned (pipeline/run/checkpoint.py). A local folder is known by its files (`weights_fingerprint`),
whatever the folder is called and wherever it was copied to.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from actors.version import CAPTIONS
from pipeline.ledger.entries import FORMAT
from pipeline.spec.job_spec import JobSpec, SpecError
from pipeline.storage.files import absolute

_READ_BY_MODELS = {".json", ".jinja", ".txt", ".model", ".py", ".safetensors", ".bin", ".pt", ".pth"}
_WHOLE_BYTES = 8 << 20  # files up to this size are hashed whole
_SAMPLE_BYTES = 4096  # of each tensor, from its middle: 2,048 bfloat16 weights
_SAMPLES = 256  # of a large file that has no list of its tensors


def caption_fields(spec: JobSpec) -> dict[str, Any]:
    """Dotted name -> JSON value of everything captions depend on: spec fields, checkpoint and code version."""
    fields = spec.fingerprint_fields()
    if os.path.isdir(spec.model.path):
        del fields["model.path"]
        fields["model.weights"] = weights_fingerprint(absolute(spec.model.path))
    if spec.input.keep is not None:  # a set: their order is a matter of looks
        fields["input.keep"] = sorted(spec.input.keep)
    return {**fields, "tessera.captions": CAPTIONS, "tessera.format": FORMAT}


def identity_record(spec: JobSpec) -> dict[str, Any]:
    """What spec.json holds: the fields, a fingerprint over them, and the whole spec with local paths absolute."""
    fields = caption_fields(spec)
    text = json.dumps(fields, sort_keys=True)
    whole = spec.model_dump(mode="json")
    whole["input"]["path"] = [absolute(url) for url in spec.input.path]
    whole["output"]["path"] = absolute(spec.output.path)
    if os.path.isdir(spec.model.path):
        whole["model"]["path"] = absolute(spec.model.path)
    return {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16], "fields": fields, "spec": whole}


def recorded(data: bytes, source: str) -> dict[str, Any]:
    """What a spec.json holds, as `identity_record` made it; SpecError if it is damaged."""
    try:
        record: dict[str, Any] = json.loads(data)
        sections = [record["spec"][name] for name in ("input", "model", "output")]
        if isinstance(record["fields"], dict) and all("path" in section for section in map(dict, sections)):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise SpecError(
        f"{source} is damaged, so that nobody can tell which job this output is of: put it back from a copy, or set "
        "output.path to a new folder"
    )


def mismatch(url: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why a run with the fields `now` may not add to an output with the fields `before`, and what to do instead."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not names:
        return None
    differing = "; ".join(
        f"{name} ({json.dumps(before.get(name))} there, {json.dumps(now.get(name))} here)" for name in names
    )
    advice = "Set output.path to a new folder, or set the fields back."
    if "model.weights" in names:
        advice += " model.weights stands for the files of the checkpoint folder: they are not the same ones."
    if "tessera.captions" in names:
        advice += (
            " tessera.captions is the version of Tessera's prompts and tiling: captions would change with it."
        )
    if "tessera.format" in names:
        advice += (
            " tessera.format is the version of its files: the captions are whole; go on with the Tessera that wrote "
            "them."
        )
    return f"{url} holds captions of a job that differs in {differing}. {advice}"


def weights_fingerprint(folder: str) -> str:
    """16 hex digits over a checkpoint folder, cheap even for hundreds of gigabytes.

    Covers names, sizes and content of the files models are read from (not of README, logs or pictures); neither
    modification times nor the folder's own name. Files up to 8 MiB count whole: configs, tokenizer, templates, toy
    weights. Of larger safetensors files the header counts, and 4 KiB from the middle of every tensor, so a fine-tune
    that touched a single layer tells; of other large files 256 blocks, evenly spread.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix not in _READ_BY_MODELS or not path.is_file() or "/." in f"/{name}":
            continue
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            for chunk in _samples(file, size, path.suffix == ".safetensors"):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _samples(file: BinaryIO, size: int, safetensors: bool) -> Iterator[bytes]:
    if size <= _WHOLE_BYTES:
        yield file.read()
        return
    middles: list[tuple[int, int]] = []  # where a tensor (or stretch) begins and ends
    if safetensors:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
        try:
            tensors = json.loads(header)
            offsets = [item["data_offsets"] for name, item in tensors.items() if name != "__metadata__"]
            middles = sorted((8 + length + start, 8 + length + end) for start, end in offsets)
            yield header
        except (ValueError, LookupError, TypeError, AttributeError):
            pass  # damaged, so not what the model is read from: actors/checkpoint_files.py has looked at that
    if not middles:
        middles = [(size * i // _SAMPLES, size * (i + 1) // _SAMPLES) for i in range(_SAMPLES)]
    for start, end in middles:
        file.seek(max(start, (start + end - _SAMPLE_BYTES) // 2))
        yield file.read(min(_SAMPLE_BYTES, end - start))
