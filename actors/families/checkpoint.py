"""What a checkpoint folder says, whichever transformers wrote it.

The one idea: the 4.x layout (`preprocessor_config.json`, optional `processor_config.json`, template in
`chat_template.json` or in the tokenizer) and the 5.x layout (one `processor_config.json` with a nested
`image_processor`, plus `chat_template.jinja`) are read into one `Checkpoint`, with the stock loaders'
precedence. No stock processor is constructed, so torchvision is never needed. No weights are read.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: it breaks the job, not a row."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything but the weights."""

    path: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    image_processor: Mapping[str, Any]
    """The image processor's fields (4.x: preprocessor_config.json; 5.x: nested); {} where there are none."""
    video_processor: Mapping[str, Any]
    """The video processor's fields: nested, of video_preprocessor_config.json, or else the image processor's."""
    processor: Mapping[str, Any]
    """The processor's own fields (processor_config.json); {} where there are none."""
    chat_template: str | None
    eos_token_ids: frozenset[int]
    """Ids that end a caption, as stock `generate` would take them; the tokenizer's only as a last resort."""
    stop_strings: tuple[str, ...]
    """Texts that end a caption, whatever the job asks for."""


def read_checkpoint(path: str, revision: str | None, trust_remote_code: bool) -> Checkpoint:
    """Read the configs, tokenizer and chat template of a local folder or a hub id."""
    path = os.fspath(path)
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    processor = read_json(path, "processor_config.json", revision) or {}
    image_processor = processor.get("image_processor")
    if image_processor is None:
        image_processor = read_json(path, "preprocessor_config.json", revision) or {}
    video_processor = processor.get("video_processor")
    if video_processor is None:
        video_processor = read_json(path, "video_preprocessor_config.json", revision) or image_processor
    generation = read_json(path, "generation_config.json", revision)
    stop = (generation or {}).get("stop_strings") or ()
    nested = ("image_processor", "video_processor")
    return Checkpoint(
        path=path,
        config=config,
        tokenizer=tokenizer,
        image_processor=image_processor,
        video_processor=video_processor,
        processor={key: value for key, value in processor.items() if key not in nested},
        chat_template=_chat_template(path, revision, processor, tokenizer),
        eos_token_ids=_eos_token_ids(generation, config, tokenizer),
        stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def read_model_type(path: str, revision: str | None) -> str:
    """`model_type` of the checkpoint's config.json; CheckpointError when there is none to read."""
    if os.path.isabs(path) and not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such checkpoint folder")
    try:
        config = read_json(path, "config.json", revision)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error}") from error
    if config is None:
        raise CheckpointError(f"{path}: no config.json there, so it is not a checkpoint")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path}: config.json has no model_type")
    return model_type


def read_json(path: str, name: str, revision: str | None) -> dict[str, Any] | None:
    """A JSON object of the checkpoint, or None where the file is not there."""
    text = _read_text(path, name, revision)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: {name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} holds no JSON object")
    return value


def square_side(size: object) -> int:
    """Side of a processor's square `size`: 384, {"height": 384, "width": 384} or {"shortest_edge": 384}."""
    if isinstance(size, int):
        return size
    if isinstance(size, Mapping):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if size.get(key)}
        if len(sides) == 1:
            return int(sides.pop())
    raise CheckpointError(f"the image processor's size must be one square, found {size!r}")


def _read_text(path: str, name: str, revision: str | None) -> str | None:
    file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    with open(file, encoding="utf-8") as reader:
        return reader.read()


def _chat_template(
    path: str, revision: str | None, processor: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """The default template, in the stock processors' order of precedence, then the tokenizer's."""
    legacy = read_json(path, "chat_template.json", revision) or {}
    candidates = (
        processor.get("chat_template"),
        legacy.get("chat_template"),
        _read_text(path, "chat_template.jinja", revision),
        tokenizer.chat_template,
    )
    for template in candidates:
        if isinstance(template, Mapping):  # several named templates
            template = template.get("default")
        if isinstance(template, str):
            return template
    return None


def _eos_token_ids(
    generation: Mapping[str, Any] | None, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    if generation is None:
        stock = GenerationConfig.from_model_config(config).eos_token_id
    else:
        stock = generation.get("eos_token_id")
    for found in (stock, tokenizer.eos_token_id):
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
