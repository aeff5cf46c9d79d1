"""The job spec: one YAML file says everything about a captioning job.

Why: a job that runs for days must be refused in its first second, in words, when it is wrong. So every
field is typed and ranged here, unknown fields are refused, and every error names the field, what was found
and the fix.

The spec is a value. It is frozen, holds no secrets (storage credentials come from the
environment) and knows which of its fields captions depend on (`fingerprint_fields`), which is what makes a
resumed run safe.

>>> spec = parse_spec({"input": {"path": "in"}, "model": {"path": "m"}, "output": {"path": "out"}})
>>> spec.generation.max_new_tokens, spec.resources.generate.replicas
(128, (1, 8))
"""

import os
import re
import string
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from actors.images.formats import DEFAULT_FORMATS, PILLOW
from pipeline.spec import errors as spec_errors
from pipeline.spec.secrets import WHERE_THEY_BELONG, holds_credentials, redacted


class SpecError(ValueError):
    """The job spec is wrong; the message names the field, what was found and what to write instead."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))  # it may repeat a URL


def _without_credentials(url: str) -> str:
    if holds_credentials(url):
        raise ValueError(WHERE_THEY_BELONG)
    if not url.strip():
        raise ValueError("must not be empty")
    return url


def _as_sequence(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_range(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        raise ValueError("must be a number of replicas, or [min, max]")
    return (value, value) if isinstance(value, int) else value


def _checked_range(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] < 1:
        raise ValueError("needs at least 1 replica")
    if value[0] > value[1]:
        raise ValueError(f"the minimum ({value[0]}) is above the maximum ({value[1]}); write [min, max]")
    return value


def _whole_above_one(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("must be a whole number when above 1 (a fraction shares one device)")
    return value


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def template_fields(template: str) -> tuple[str, ...]:
    """Column names in a prompt template, in order of first use.

    The language is `str.format` with plain names only: `{column}`, and `{{` `}}` for literal braces. A
    checked template is rendered by `template.format_map(row)`. Raises ValueError for anything else.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        message = f"is not a valid template ({error}); write {{{{ and }}}} for literal braces"
        raise ValueError(message) from None
    fields: dict[str, None] = {}
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if form or conversion or not name.strip() or name.isdigit() or re.search(r"[.\[\]{}]", name):
            found = name + ("!" + conversion if conversion else "") + (":" + form if form else "")
            raise ValueError(
                f"holds {{{found}}}, but only plain column names are filled in, as in {{title}}; "
                "write {{ and }} for literal braces"
            )
        fields[name] = None
    return tuple(fields)


def _checked_template(template: str) -> str:
    template_fields(template)
    return template


def _known_formats(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in PILLOW:
            raise ValueError(f"{name!r} is none of the formats that can be decoded: {', '.join(PILLOW)}")
    return names


Url = Annotated[str, AfterValidator(_without_credentials)]
Urls = Annotated[tuple[Url, ...], BeforeValidator(_as_sequence), Field(min_length=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_sequence)]
Template = Annotated[str, AfterValidator(_checked_template)]
Count = Annotated[int, BeforeValidator(_not_bool)]
Real = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Replicas = Annotated[tuple[int, int], BeforeValidator(_as_range), AfterValidator(_checked_range)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class InputSpec(_Section):
    """Where rows come from. `path`: file, folder (recursive), glob, or a list of them; any fsspec URL.

    `image` names a column of bytes, of {bytes, path} structs (Hugging Face Image) or of lists of either; an
    empty list is a text-only row. Null names no column. `video` names a column of lists of encoded frames, in
    time order: each list is a video, of which `max_frames` frames, evenly spaced, are used at most; null or an
    empty list is a row without one. `prompt` names a column that holds each row's prompt: text, or a chat
    as a list of {role, content} messages (several turns). `keep` names the columns copied to the output.
    """

    path: Urls
    image: str | None = "image"
    video: str | None = None
    max_frames: Count = Field(default=32, ge=1)
    prompt: str | None = None
    keep: Names | None = None


class PromptSpec(_Section):
    """`template` is every row's prompt when `input.prompt` is null; {column} is filled from the row."""

    template: Template = "Describe the image."
    system: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Columns the template reads, in order of first use."""
        return template_fields(self.template)


class ModelSpec(_Section):
    """The checkpoint: a hub id or a local folder; its family is read from its config."""

    path: Annotated[Url, AfterValidator(os.path.expanduser)]
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    engine: Literal["continuous", "reference"] = "continuous"


class GenerationSpec(_Section):
    """Sampling. Temperature 0 is greedy; top_k 0 is off; a row's seed is of `seed` and the row's identity."""

    max_new_tokens: Count = Field(default=128, ge=1)
    temperature: Real = Field(default=0.0, ge=0)
    top_p: Real = Field(default=1.0, gt=0, le=1)
    top_k: Count = Field(default=0, ge=0)
    repetition_penalty: Real = Field(default=1.0, gt=0)
    stop: Names = ()
    seed: Count = Field(default=0, ge=0, lt=2**63)


class PreprocessResources(_Section):
    """Actors that decode, tile and tokenise: how many [min, max], and CPUs for each."""

    replicas: Replicas = (1, 16)
    cpus: Annotated[Real, AfterValidator(_whole_above_one)] = Field(default=1, gt=0)


class GenerateResources(_Section):
    """Actors that hold the model: how many [min, max], and GPUs and CPUs for each (gpus: 0 runs on CPU).

    `cpus` null: none beside a GPU; without one what the machine has, or what the cluster's largest node has left
    (pipeline/run/cluster.py); on one machine of several NUMA nodes, a replica a node. A replica without a GPU computes
    on so many threads.
    """

    replicas: Replicas = (1, 8)
    gpus: Annotated[Real, AfterValidator(_whole_above_one)] = Field(default=1, ge=0)
    cpus: Annotated[Real, AfterValidator(_whole_above_one)] | None = Field(default=None, ge=0)


class ResourcesSpec(_Section):
    preprocess: PreprocessResources = PreprocessResources()
    generate: GenerateResources = GenerateResources()


class OutputSpec(_Section):
    """Where captions go: a folder or an object-store prefix of this job's own."""

    path: Url


class LimitsSpec(_Section):
    """A job that is done exits 3 above `max_failed_fraction`, the share of error rows, or `max_failed_shards`, the
    number of input files that cannot be read, wholly or in part. A run stops with 3 once `stop_after_failures` rows,
    all so far, failed with one kind of error (null: never). A run over changed shards that hold more than
    `max_recaption_fraction` of the rows captioned is refused until it is asked for. `max_pixels` and `max_image_bytes`
    are of one image: decoded, and encoded (64 MiB hold a photograph of 100 Mpixel, and a block of 32 such rows still
    fits in memory). `formats` are those that are decoded (actors/images/formats.py)."""

    max_failed_fraction: Real = Field(default=0.05, ge=0, le=1)
    max_failed_shards: Count = Field(default=0, ge=0)
    stop_after_failures: Annotated[Count, Field(ge=1)] | None = 200
    max_recaption_fraction: Real = Field(default=0.1, ge=0, le=1)
    max_pixels: Count = Field(default=178_956_970, ge=1)
    max_image_bytes: Count = Field(default=64 << 20, ge=1)
    formats: Annotated[Names, Field(min_length=1), AfterValidator(_known_formats)] = DEFAULT_FORMATS


class JobSpec(_Section):
    """A whole captioning job. Build it with `load_spec` or `parse_spec`, which turn errors into SpecError."""

    name: str = Field(default="captions", min_length=1)
    input: InputSpec
    prompt: PromptSpec = PromptSpec()
    model: ModelSpec
    generation: GenerationSpec = GenerationSpec()
    resources: ResourcesSpec = ResourcesSpec()
    output: OutputSpec
    limits: LimitsSpec = LimitsSpec()

    def fingerprint_fields(self) -> dict[str, Any]:
        """Dotted name -> JSON value of every field captions depend on (ledger/identity.py adds what lies beyond).

        Not the input's path (a grown folder is an increment), not the engine (engines are token-exact), not limits
        (they decide which rows fail, not what a caption says: raise one, and retry those rows), not resources, name or
        output: those may change between the runs of one output.
        """
        flat = spec_errors.flatten(self.model_dump(mode="json"))
        inputs = ("input.image", "input.video", "input.max_frames", "input.prompt", "input.keep")
        chosen = (*inputs, "model.path", "model.revision", "model.dtype")
        return {
            name: value
            for name, value in flat.items()
            if name in chosen or name.startswith(("prompt.", "generation."))
        }


def parse_spec(data: object, source: str = "job spec") -> JobSpec:
    """A JobSpec from a parsed YAML mapping; raises SpecError, one line a problem, fields in dotted names."""
    if not isinstance(data, dict):
        raise SpecError(f"{source}: must be a mapping of fields, found {spec_errors.shown(data)}")
    try:
        return JobSpec.model_validate(data)
    except ValidationError as error:
        lines = [spec_errors.explain(problem, JobSpec) for problem in error.errors(include_url=False)]
        raise SpecError("\n".join(f"{source}: {line}" for line in lines)) from None


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Reads a YAML spec (local path or any fsspec URL) and applies `dotted.name=value` overrides in order.

    A value is parsed as YAML, except that a text field takes its value as it is when YAML would make
    something else of it (`prompt.template={title}: what is it?`). Raises SpecError.
    """
    data = _parse_yaml(_read_text(str(path)), str(path))
    if isinstance(data, dict):
        for override in overrides:
            apply_override(data, override)
    return parse_spec(data, source=str(path))


def _read_text(path: str) -> str:
    if holds_credentials(path):
        raise SpecError(f"{path}: {WHERE_THEY_BELONG}")
    try:
        if "://" not in path:
            return Path(path).read_text(encoding="utf-8")
        import fsspec  # only for URLs: the import is slow

        with fsspec.open(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except IsADirectoryError:
        raise SpecError(f"{path}: is a folder; name the job spec, a .yaml file") from None
    except (OSError, ImportError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SpecError(f"{path}: the job spec cannot be read ({why})") from None


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one `dotted.name=value` in the nested fields of a spec; raises SpecError."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise SpecError(f"--set {override}: write field=value, for instance generation.max_new_tokens=64")
    value = text if _keeps_text(keys, text) else _parse_yaml(text, f"--set {name}")
    section = data
    for key in keys[:-1]:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise SpecError(f"--set {override}: {key} is not a section of the spec")
    section[keys[-1]] = value


def _keeps_text(keys: Sequence[str], text: str) -> bool:
    """True when the field is text and YAML would read something else than text, null or nothing."""
    annotation = spec_errors.annotation_of(keys, JobSpec)
    if annotation is not str and set(get_args(annotation)) != {str, NoneType}:
        return False
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError:
        return True
    return not isinstance(parsed, str) and text.strip() not in ("null", "~", "")
