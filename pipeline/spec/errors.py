"""Turns pydantic's validation errors into sentences a person can act on.

A message names the field as it is written in YAML (dotted), what was found there, and the
fix: the nearest known field for an unknown one, the range or choices for a value, quotes for text that YAML
read as a number.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

# pydantic's words for what a YAML file holds
_PLAIN = (
    (r"a valid dictionary or instance of \w+", "a section, with its fields indented below it"),
    (r", unable to parse string as .*", ""),
    (r"a valid tuple", "a list"),
    (r"a valid string", "text"),
    (r"[Vv]alue should have at least (\d+) items?.*", r"must have at least \1"),
)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted name: value}; lists are values.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def shown(value: object) -> str:
    """A value for a message: short, and with nothing called nothing."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every leaf field's dotted name, in order."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        names.extend(field_names(section, f"{prefix}{name}.") if section else [prefix + name])
    return names


def annotation_of(keys: Sequence[str], model: type[BaseModel]) -> object | None:
    """The type annotation of a dotted field, or None when there is no such field."""
    section: type[BaseModel] | None = model
    annotation: object | None = None
    for key in keys:
        if section is None or key not in section.model_fields:
            return None
        annotation = section.model_fields[key].annotation
        section = _section(annotation)
    return annotation


def explain(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    """One pydantic error (an item of `ValidationError.errors()`) as one sentence."""
    location, kind = problem["loc"], problem["type"]
    name = _dotted(location)
    if kind == "extra_forbidden":
        return f"unknown field {name}; {_nearest(name, model)}"
    if kind == "missing":
        return f"{name} is missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    for theirs, plain in _PLAIN:
        message = re.sub(theirs, plain, message)
    if "holds credentials" in message:  # never repeat a secret
        return f"{name} {message}"
    if kind == "string_type" and isinstance(problem["input"], int | float | bool):
        message += "; put it in quotes"
    message = message[0].lower() + message[1:]
    return f"{name}: {message}; found {shown(problem['input'])}"


def _section(annotation: object) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _dotted(location: Sequence[str | int]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location).removeprefix(".")


def _nearest(name: str, model: type[BaseModel]) -> str:
    names = field_names(model)
    parent, dot, leaf = name.rpartition(".")
    below = [known.removeprefix(parent + dot) for known in names if known.startswith(parent + dot)]
    siblings = list(dict.fromkeys(known.partition(".")[0] for known in below))
    close = difflib.get_close_matches(leaf, siblings, n=1)
    if close:
        return f"did you mean {parent + dot}{close[0]}?"
    elsewhere = [known for known in names if known.rpartition(".")[2] == leaf]
    elsewhere = elsewhere or difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"{parent or 'the spec'} has {', '.join(siblings)}"
