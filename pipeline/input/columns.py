"""Which columns a job reads, keeps and writes, and the checks that refuse a job whose columns do not fit.

Why: a missing column found after an hour of GPU time is an hour lost; all of them are found here, from
footers, before anything starts. Messages name the column, what was found, what there is, the nearest name.

Every sealed file of a job has the same schema (`sealed_schema`), whatever the accidents of
single shards: large and dictionary types become plain ones, a column that is all null in one shard takes the
type it has in the others. So the output opens as one table everywhere.
"""

import difflib
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.types as pt

from actors.schema import IDENTITY, IMAGES, PIXELS, RESULT_SCHEMA, SIZES, TOKEN_IDS, VIDEO
from pipeline.input.shards import InputError, Shard
from pipeline.spec.job_spec import JobSpec

# A kept column may not have one of these names: the output, or a stage on the way, needs it for itself.
RESERVED_COLUMNS = (*IDENTITY, *RESULT_SCHEMA.names, IMAGES, VIDEO, TOKEN_IDS, PIXELS, SIZES)


def sealed_schema(kept: pa.Schema) -> pa.Schema:
    """The schema of every sealed file of a job, from that of its kept columns (`job_schema`)."""
    return pa.schema([*(pa.field(f.name, plain_type(f.type)) for f in kept), *RESULT_SCHEMA])


def kept_columns(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    """Columns copied to the output: `input.keep`, or else all but image data, in the file's order."""
    if spec.input.keep is not None:
        return spec.input.keep
    pictures = (spec.input.image, spec.input.video)
    return tuple(f.name for f in schema if f.name not in pictures and not _is_image_struct(f.type))


def with_kept(spec: JobSpec, kept: pa.Schema) -> JobSpec:
    """The spec with `input.keep` as the columns that it stands for (`job_schema`): what an output remembers.

    So a job that kept all columns goes on when a later shard has one more and `input.keep` names those there were.
    """
    return spec.model_copy(update={"input": spec.input.model_copy(update={"keep": tuple(kept.names)})})


def needed_columns(spec: JobSpec, schema: pa.Schema) -> tuple[str, ...]:
    """Columns that travel beside the pictures: prompt or template fields, and kept ones; each once."""
    prompt = spec.prompt.fields if spec.input.prompt is None else (spec.input.prompt,)
    return tuple(dict.fromkeys((*prompt, *kept_columns(spec, schema))))


def check_columns(spec: JobSpec, schema: pa.Schema, shard: str = "the input") -> None:
    """Raises InputError unless a shard with this schema can be captioned as the spec says."""
    _check_image(spec, schema, shard)
    _check_video(spec, schema, shard)
    _check_prompt(spec, schema, shard)
    _check_keep(spec, schema, shard)


def _check_image(spec: JobSpec, schema: pa.Schema, shard: str) -> None:
    name = spec.input.image
    if name is None:
        return
    if spec.input.video is not None and name not in schema.names:
        raise InputError(
            f"input.image: {shard} has no column {name!r}; {available(name, schema.names)}; set input.image to null "
            "where rows have videos alone"
        )
    found = _type_of(name, "input.image", schema, shard)
    if not _is_image(found):
        others = [repr(f.name) for f in schema if _is_image(f.type)]
        raise InputError(
            f"input.image: column {name!r} of {shard} holds {found}, not images; it must hold "
            "bytes, {bytes, path} structs or lists of either"
            + (f"; columns that do: {', '.join(others)}" if others else "")
        )


def _check_video(spec: JobSpec, schema: pa.Schema, shard: str) -> None:
    name = spec.input.video
    if name is None:
        return
    found = _type_of(name, "input.video", schema, shard)
    if not _is_list(found) or not _is_image(found):
        raise InputError(
            f"input.video: column {name!r} of {shard} holds {found}, not frames; it must hold a "
            "list of encoded frames a row (bytes or {bytes, path} structs); video files are not decoded"
        )


def _check_prompt(spec: JobSpec, schema: pa.Schema, shard: str) -> None:
    if spec.input.prompt is not None:
        found = _type_of(spec.input.prompt, "input.prompt", schema, shard)
        if not _is_text(found) and not _is_chat(found):
            raise InputError(
                f"input.prompt: column {spec.input.prompt!r} of {shard} holds {found}, not prompts; it must "
                "hold strings, or lists of {role, content} messages"
            )
        return
    for name in spec.prompt.fields:
        found = _type_of(name, "prompt.template", schema, shard)
        if pt.is_nested(found) or _is_binary(found):
            raise InputError(
                f"prompt.template: column {name!r} of {shard} holds {found}, which is no text to fill "
                "in; use a column of strings or numbers"
            )


def _check_keep(spec: JobSpec, schema: pa.Schema, shard: str) -> None:
    kept = kept_columns(spec, schema)
    for name in kept:
        _type_of(name, "input.keep", schema, shard)
    reserved = [name for name in kept if name in RESERVED_COLUMNS]
    if reserved:
        others = [name for name in kept if name not in RESERVED_COLUMNS]
        raise InputError(
            f"input.keep: column {reserved[0]!r} of {shard} has a name that the output needs for itself; set "
            f"input.keep to what you want, for instance [{', '.join(others)}], or rename it in the input"
        )


def _type_of(name: str, field: str, schema: pa.Schema, shard: str) -> pa.DataType:
    """The type of a column that the spec's `field` names; InputError where it is missing, or there twice."""
    if name not in schema.names:
        raise InputError(f"{field}: {shard} has no column {name!r}; {available(name, schema.names)}")
    if len(schema.get_all_field_indices(name)) > 1:
        raise InputError(f"{field}: {shard} has the column {name!r} twice; rename one of them")
    return schema.field(name).type


def job_schema(spec: JobSpec, shards: Sequence[Shard]) -> pa.Schema:
    """Checks every shard (`check_columns`) and that they agree; returns the schema of the kept columns.

    Shards agree when a kept column has one plain type in all of them, or is all null in some (type null).
    """
    seen: dict[int, Shard] = {}
    for shard in shards:
        seen.setdefault(id(shard.schema), shard)
    types: dict[str, tuple[pa.DataType, Shard]] = {}
    columns: tuple[str, ...] | None = None
    for shard in seen.values():
        check_columns(spec, shard.schema, shard.name)
        names = kept_columns(spec, shard.schema)
        columns = columns or names
        if set(names) != set(columns):
            odd = sorted(set(names) ^ set(columns))
            raise InputError(
                f"input.keep: shards differ in their columns ({', '.join(odd)} only in some: {shard.name}); "
                "set input.keep to columns that all have, for instance "
                f"[{', '.join(name for name in columns if name in names)}]"
            )
        for name in names:
            found = plain_type(shard.schema.field(name).type)
            known, where = types.setdefault(name, (found, shard))
            if pa.types.is_null(known):
                types[name] = (found, shard)
            elif found != known and not pa.types.is_null(found):
                raise InputError(
                    f"input.keep: column {name!r} holds {known} in {where.name} but {found} in {shard.name}; "
                    "leave it out of input.keep, or make the shards agree"
                )
    return pa.schema([(name, types[name][0]) for name in columns or ()])


def plain_type(found: pa.DataType) -> pa.DataType:
    """The type without what some readers stumble over: large, view and dictionary types become plain ones."""
    if pt.is_dictionary(found):
        return plain_type(found.value_type)
    if pt.is_large_string(found) or pt.is_string_view(found):
        return pa.string()
    if pt.is_large_binary(found) or pt.is_binary_view(found):
        return pa.binary()
    if pt.is_struct(found):
        return pa.struct([pa.field(f.name, plain_type(f.type)) for f in found])
    if _is_list(found) and not pt.is_fixed_size_list(found):
        return pa.list_(plain_type(found.value_type))
    return found


def available(name: str, names: Sequence[str]) -> str:
    """What a message says of a column that is not there: the names that are, and the nearest."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"it has {', '.join(names)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _is_list(found: pa.DataType) -> bool:
    lists = (pt.is_list, pt.is_large_list, pt.is_fixed_size_list, pt.is_list_view, pt.is_large_list_view)
    return any(test(found) for test in lists)


def _is_binary(found: pa.DataType) -> bool:
    return pt.is_binary(found) or pt.is_large_binary(found) or pt.is_binary_view(found)


def _is_text(found: pa.DataType) -> bool:
    if pt.is_dictionary(found):
        return _is_text(found.value_type)
    return pt.is_string(found) or pt.is_large_string(found) or pt.is_string_view(found) or pt.is_null(found)


def _field_types(found: pa.DataType) -> dict[str, pa.DataType]:
    return {f.name: f.type for f in found} if pt.is_struct(found) else {}


def _is_image_struct(found: pa.DataType) -> bool:
    """{bytes, path} or a list of it: what Hugging Face's Image feature is in parquet."""
    if _is_list(found):
        return _is_image_struct(found.value_type)
    fields = _field_types(found)
    return "bytes" in fields and _any_image_bytes((fields["bytes"],)) and set(fields) <= {"bytes", "path"}


def _any_image_bytes(types: Iterable[pa.DataType]) -> bool:
    return any(_is_binary(found) or pt.is_null(found) for found in types)


def _is_image(found: pa.DataType) -> bool:
    if _is_list(found):
        return not _is_list(found.value_type) and _is_image(found.value_type)
    fields = _field_types(found)
    if "bytes" in fields:
        return _any_image_bytes((fields["bytes"],))
    return _any_image_bytes((found,)) or ("path" in fields and _is_text(fields["path"]))


def _is_chat(found: pa.DataType) -> bool:
    return _is_list(found) and {"role", "content"} <= set(_field_types(found.value_type))
