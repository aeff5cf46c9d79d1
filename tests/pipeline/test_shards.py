"""Shards: stable names, honest fingerprints, row counts from footers; columns checked before a run."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.columns import check_columns, job_schema, kept_columns, needed_columns, sealed_schema
from pipeline.shards import InputError, Shard, discover, shard_schema
from pipeline.spec import InputSpec, JobSpec, parse_spec
from pipeline.storage import Storage

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, rows: int = 3, **columns: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"id": pa.array(range(rows)), "image": pa.array([b"x"] * rows, pa.binary())} | columns
    pq.write_table(pa.table(table), path)
    return path


def names(*paths: str | Path) -> list[str]:
    return [shard.name for shard in discover(InputSpec(path=tuple(map(str, paths))))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.parquet", "a.parquet", "sub/c.parquet", "sub/deep/d.parquet"):
        write(tmp_path / "in" / name, rows=len(name))
    for name in ("_x.parquet", ".y.parquet", "_tmp/z.parquet", ".git/z.parquet"):
        write(tmp_path / "in" / name)
    (tmp_path / "in" / "README.md").write_text("hello")
    return tmp_path / "in"


def test_a_folder_is_read_recursively_and_hidden_names_are_not(folder: Path) -> None:
    shards = discover(InputSpec(path=(str(folder),)))
    assert [(shard.name, shard.rows) for shard in shards] == [
        ("a.parquet", 9),
        ("b.parquet", 9),
        ("sub/c.parquet", 13),
        ("sub/deep/d.parquet", 18),
    ]
    assert shards[0].url == str(folder / "a.parquet")
    assert shards[2].root == str(folder)
    assert shards[0].size == (folder / "a.parquet").stat().st_size
    assert shards[0].schema is shards[1].schema


def test_the_root_follows_from_the_spec_not_from_the_files(folder: Path) -> None:
    assert names(folder / "a.parquet") == ["a.parquet"]
    assert names(folder / "_x.parquet") == ["_x.parquet"]
    assert names(f"{folder}/*.parquet") == ["a.parquet", "b.parquet"]
    assert names(f"{folder}/s*/*.parquet") == ["sub/c.parquet"]
    assert names(f"{folder}/**/*.parquet") == [
        "a.parquet",
        "b.parquet",
        "sub/c.parquet",
        "sub/deep/d.parquet",
    ]
    assert names(f"{folder}/s*") == ["sub/c.parquet", "sub/deep/d.parquet"]
    assert names(folder / "sub", folder / "b.parquet") == ["b.parquet", "sub/c.parquet", "sub/deep/d.parquet"]
    assert names(folder / "sub", folder / "sub/deep") == ["c.parquet", "deep/d.parquet"]


def test_a_relative_path_is_made_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert discover(InputSpec(path=("in",))) == discover(InputSpec(path=(str(folder),)))


def test_an_output_below_the_input_is_not_input(folder: Path) -> None:
    before = names(folder)
    write(folder / "captions" / "data" / "a.parquet")
    write(folder / "captions" / "_tessera" / "journal" / "part-0.parquet")
    assert names(folder) == before
    assert names(folder / "captions") == ["data/a.parquet"]  # captions of captions: asked for by name


def test_a_changed_file_is_a_changed_fingerprint(folder: Path) -> None:
    def prints() -> dict[str, str]:
        return {shard.name: shard.fingerprint for shard in discover(InputSpec(path=(str(folder),)))}

    before = prints()
    assert prints() == before
    path = folder / "a.parquet"
    data = bytearray(path.read_bytes())
    data[10] ^= 1  # the same size
    path.write_bytes(data)
    changed = {name for name, value in prints().items() if value != before[name]}
    assert changed == {"a.parquet"}


def test_s3(s3_url: str, folder: Path) -> None:
    storage = Storage(s3_url)
    for name in ("b.parquet", "sub/c.parquet", "_x.parquet"):
        storage.put_atomic(f"in/{name}", (folder / name).read_bytes())
    shards = discover(InputSpec(path=(f"{s3_url}/in/",)))
    assert [(shard.name, shard.url) for shard in shards] == [
        ("b.parquet", f"{s3_url}/in/b.parquet"),
        ("sub/c.parquet", f"{s3_url}/in/sub/c.parquet"),
    ]
    assert {shard.root for shard in shards} == {f"{s3_url}/in"}
    for path, expected in {
        "in/*.parquet": ["b.parquet"],
        "in/sub/c.parquet": ["c.parquet"],
        "in/**/*.parquet": ["b.parquet", "sub/c.parquet"],
    }.items():
        found = discover(InputSpec(path=(f"{s3_url}/{path}",)))
        assert [shard.name for shard in found] == expected
        assert {shard.fingerprint for shard in found} <= {shard.fingerprint for shard in shards}
    storage.put_atomic("in/b.parquet", (folder / "sub/deep/d.parquet").read_bytes())
    assert discover(InputSpec(path=(f"{s3_url}/in/",)))[0].fingerprint != shards[0].fingerprint
    with pytest.raises(InputError, match="nowhere does not exist"):
        discover(InputSpec(path=(f"{s3_url}/nowhere",)))


def test_files_that_are_no_parquet_are_named(folder: Path) -> None:
    (folder / "sub" / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match=r"sub/bad\.parquet is not a parquet file"):
        names(folder)
    (folder / "sub" / "bad.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-3])
    (folder / "sub" / "worse.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"sub/bad\.parquet .*1 more"):
        names(folder)
    damaged = (folder / "a.parquet").read_bytes()
    (folder / "sub" / "bad.parquet").write_bytes(damaged[:4] + b"\xff" * (len(damaged) - 12) + damaged[-8:])
    with pytest.raises(InputError, match=r"sub/bad\.parquet .*damaged"):
        names(folder)


def test_a_footer_larger_than_the_first_read(tmp_path: Path) -> None:
    wide = {f"column_{i}": pa.array([i]) for i in range(2000)}
    write(tmp_path / "wide.parquet", rows=1, **wide)
    assert discover(InputSpec(path=(str(tmp_path),)))[0].rows == 1
    assert len(shard_schema(str(tmp_path / "wide.parquet"))) == 2002


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no parquet files found"):
        names(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        names(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no parquet files found"):
        names(f"{tmp_path}/*.parquet")
    with pytest.raises(InputError, match="cannot be read"):
        names("nosuchstore://bucket/x")


def test_two_shards_with_one_output_name_are_refused(folder: Path) -> None:
    os.link(folder / "a.parquet", folder / "a")
    with pytest.raises(InputError, match="rename one of them"):
        names(folder / "a", folder / "a.parquet")


def spec_of(**input_fields: object) -> JobSpec:
    template = input_fields.pop("template", "Describe.")
    sections = {"model": {"path": "m"}, "output": {"path": "o"}, "prompt": {"template": template}}
    return parse_spec({"input": {"path": "in", **input_fields}, **sections})


SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("image", IMAGE),
        ("second", pa.list_(IMAGE)),
        ("title", pa.large_string()),
        ("n", pa.null()),
    ]
)


def test_needed_and_kept_columns() -> None:
    assert kept_columns(spec_of(), SCHEMA) == ("id", "title", "n")
    assert needed_columns(spec_of(), SCHEMA) == ("id", "title", "n")
    assert needed_columns(spec_of(keep=["id"], template="{title}"), SCHEMA) == ("title", "id")
    assert needed_columns(spec_of(keep=[], prompt="title"), SCHEMA) == ("title",)
    assert kept_columns(spec_of(keep=["image", "id"]), SCHEMA) == ("image", "id")
    frames = pa.schema([("id", pa.int64()), ("clip", pa.list_(pa.binary()))])
    assert kept_columns(spec_of(image=None, video="clip"), frames) == ("id",)


@pytest.mark.parametrize("frames", [pa.list_(pa.binary()), pa.large_list(IMAGE), pa.list_(pa.null())])
def test_video_columns(frames: pa.DataType) -> None:
    check_columns(spec_of(image=None, video="clip"), pa.schema([("clip", frames)]))


@pytest.mark.parametrize("frames", [pa.binary(), IMAGE, pa.list_(pa.string()), pa.string()])
def test_columns_that_hold_no_frames(frames: pa.DataType) -> None:
    with pytest.raises(InputError, match=r"input\.video: column 'clip' of s\.parquet holds .* not frames"):
        check_columns(spec_of(image=None, video="clip"), pa.schema([("clip", frames)]), "s.parquet")
    with pytest.raises(
        InputError, match=r"'image'; it has clip; set input\.image to null where rows have videos"
    ):
        check_columns(spec_of(video="clip"), pa.schema([("clip", pa.list_(pa.binary()))]), "s.parquet")


@pytest.mark.parametrize(
    "image",
    [
        pa.binary(), pa.large_binary(), pa.binary_view(), pa.null(), IMAGE, pa.list_(pa.binary()),
        pa.large_list(IMAGE),
        pa.list_(IMAGE, 2), pa.struct([("bytes", pa.large_binary())]), pa.struct([("path", pa.string())]),
    ],
)  # fmt: skip
def test_image_columns(image: pa.DataType) -> None:
    check_columns(spec_of(), pa.schema([("image", image)]))


@pytest.mark.parametrize(
    "image",
    [
        pa.string(),
        pa.int64(),
        pa.list_(pa.int64()),
        pa.list_(pa.list_(pa.binary())),
        pa.struct([("x", pa.binary())]),
    ],
)
def test_columns_that_hold_no_images(image: pa.DataType) -> None:
    schema = pa.schema([("image", image), ("jpg", pa.binary())])
    with pytest.raises(InputError, match=r"input\.image: column 'image' of s\.parquet holds .* 'jpg'"):
        check_columns(spec_of(), schema, "s.parquet")


CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@pytest.mark.parametrize(
    "prompt", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), CHAT]
)
def test_prompt_columns(prompt: pa.DataType) -> None:
    check_columns(spec_of(prompt="q"), pa.schema([("image", pa.binary()), ("q", prompt)]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image": "imag"}, ["input.image", "no column 'imag'", "it has id, image", "did you mean 'image'?"]),
        ({"prompt": "titel"}, ["input.prompt", "'titel'", "did you mean 'title'?"]),
        ({"prompt": "id"}, ["input.prompt", "holds int64", "strings"]),
        ({"template": "{tite} ?"}, ["prompt.template", "'tite'", "did you mean 'title'?"]),
        ({"template": "{image}"}, ["prompt.template", "'image'", "no text"]),
        ({"keep": ["id", "zzz"]}, ["input.keep", "'zzz'", "it has id"]),
        ({"keep": ["id", "caption"]}, ["input.keep", "'caption'", "[id]"]),
        ({"keep": ["_row"]}, ["input.keep", "'_row'"]),
    ],
)
def test_column_errors_name_the_column_what_there_is_and_the_fix(fields: dict, words: list[str]) -> None:
    schema = SCHEMA.append(pa.field("caption", pa.string())).append(pa.field("_row", pa.int64()))
    with pytest.raises(InputError) as caught:
        check_columns(spec_of(**({"keep": ["id"]} | fields)), schema, "s.parquet")
    for word in (*words, "s.parquet"):
        assert word in str(caught.value)


def shard_of(name: str, **columns: pa.DataType) -> Shard:
    return Shard(name, f"/{name}", 1, "f", 1, pa.schema({"image": pa.binary(), **columns}))


def test_the_schema_of_a_job_is_plain_and_the_same_for_all_shards() -> None:
    shards = [
        shard_of("a", x=pa.null(), y=pa.list_(pa.large_string())),
        shard_of("b", y=pa.large_list(pa.string()), x=pa.dictionary(pa.int8(), pa.large_string())),
        shard_of("c", x=pa.string_view(), y=pa.null()),
    ]
    kept = job_schema(spec_of(), shards)
    assert kept == pa.schema([("x", pa.string()), ("y", pa.list_(pa.string()))])
    assert sealed_schema(kept).names == [
        "x", "y", "caption", "finish_reason", "prompt_tokens", "image_tokens", "generated_tokens", "error",
    ]  # fmt: skip


def test_shards_that_differ_are_refused() -> None:
    with pytest.raises(InputError, match=r"'x' holds int64 in a but string in b"):
        job_schema(spec_of(), [shard_of("a", x=pa.int64()), shard_of("b", x=pa.string())])
    with pytest.raises(InputError, match=r"y.* only in some.*input\.keep .*\[x\]"):
        job_schema(spec_of(), [shard_of("a", x=pa.int64()), shard_of("b", x=pa.int64(), y=pa.string())])
    assert job_schema(
        spec_of(keep=["x"]), [shard_of("a", x=pa.int64()), shard_of("b", x=pa.int64(), y=pa.string())]
    )
    with pytest.raises(InputError, match="b has no column 'image'"):
        job_schema(spec_of(), [shard_of("a"), Shard("b", "/b", 1, "f", 1, pa.schema([("x", pa.int8())]))])
