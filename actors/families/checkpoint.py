"""Reads a checkpoint's configs, tokenizer and chat template, whichever transformers version wrote them.

The 4.x layout (`preprocessor_config.json`, optional `processor_config.json`, template in
`chat_template.json` or in the tokenizer) and the 5.x layout (one `processor_config.json` with a nested
`image_processor`, plus `chat_template.jinja`) are read into one `Checkpoint`, with the stock loaders'
precedence. No stock processor is constructed, so torchvision is never needed. No weights are read.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from actors.checkpoint_files import CONFIG, CheckpointError, HubError, check_name, no_config, parse_object

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


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


def read_checkpoint(path: str, revision: str | None) -> Checkpoint:
    """Read the configs, tokenizer and chat template of a local folder or a hub id. Raises CheckpointError."""
    path = os.fspath(path)
    with explained(path, revision, CONFIG):
        config = AutoConfig.from_pretrained(path, revision=revision)
    # Without a vocabulary transformers may make an empty tokenizer.
    if not any(_file(path, name, revision) for name in _TOKENIZERS):
        raise CheckpointError(f"{path}: no tokenizer there: none of {', '.join(_TOKENIZERS)}")
    with explained(path, revision, "tokenizer.json", "tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    processor = read_json(path, "processor_config.json", revision) or {}
    image_processor = _part(path, processor, "image_processor")
    if image_processor is None:
        image_processor = read_json(path, "preprocessor_config.json", revision) or {}
    video_processor = _part(path, processor, "video_processor")
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
    check_name(path)
    with explained(path, revision, CONFIG):
        # None where it is not there; raises where the hub does not say, unlike `_file`.
        file = cached_file(path, CONFIG, revision=revision)
    if file is None:
        raise no_config(path)
    model_type = parse_object(path, CONFIG, Path(file).read_bytes()).get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path}: {CONFIG} has no model_type")
    return model_type


def read_json(path: str, name: str, revision: str | None) -> dict[str, Any] | None:
    """A JSON object of the checkpoint, or None where the file is not there."""
    file = _file(path, name, revision)
    return None if file is None else parse_object(path, name, file.read_bytes())


@contextmanager
def explained(path: str, revision: str | None, *files: str) -> Iterator[None]:
    """Turns what is raised while files of a checkpoint are used into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    # Of many kinds: OSError, KeyError, huggingface_hub's StrictDataclassError, plain Exceptions of tokenizers.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        message = f"{path}: cannot use its {' or '.join(files)}: {reason}"
        if isinstance(error, OSError) and not os.path.isdir(path):
            raise HubError(message) from error
        for name in files:
            read_json(path, name, revision)  # raises for the one that is no JSON
        raise CheckpointError(message) from error


def square_side(size: object) -> int:
    """Side of a processor's square `size`: 384, {"height": 384, "width": 384} or {"shortest_edge": 384}."""
    if isinstance(size, int):
        return size
    if isinstance(size, Mapping):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if size.get(key)}
        if len(sides) == 1:
            return int(sides.pop())
    raise CheckpointError(f"the image processor's size must be one square, found {size!r}")


def _part(path: str, processor: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    part = processor.get(name)
    if part is not None and not isinstance(part, Mapping):
        raise CheckpointError(f"{path}: processor_config.json's {name} is no object, but {part!r}")
    return part


def _file(path: str, name: str, revision: str | None) -> Path | None:
    file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)


def _chat_template(
    path: str, revision: str | None, processor: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """The default template, in the stock processors' order of precedence, then the tokenizer's."""
    legacy = read_json(path, "chat_template.json", revision) or {}
    jinja = _file(path, "chat_template.jinja", revision)
    candidates = (
        processor.get("chat_template"),
        legacy.get("chat_template"),
        None if jinja is None else jinja.read_text("utf-8"),
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
