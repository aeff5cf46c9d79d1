"""Shards: stable names, honest fingerprints, row counts from footers; columns checked before a run."""

import os
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.input.columns import (
    check_columns,
    job_schema,
    kept_columns,
    needed_columns,
    sealed_schema,
    with_kept,
)
from pipeline.input.shards import InputError, Shard, discover, shard_schema
from pipeline.spec.job_spec import InputSpec, JobSpec, parse_spec
from pipeline.storage import footer
from pipeline.storage.retrying import StorageError
from pipeline.storage.storage import Storage

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, rows: int = 3, **columns: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"id": pa.array(range(rows)), "image": pa.array([b"x"] * rows, pa.binary())} | columns
    pq.write_table(pa.table(table), path)
    return path


def names(*paths: str | Path) -> list[str]:
    return [shard.name for shard in discover(InputSpec(path=tuple(map(str, paths)))).shards]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.parquet", "a.parquet", "sub/c.parquet", "sub/deep/d.parquet"):
        write(tmp_path / "in" / name, rows=len(name))
    for name in ("_x.parquet", ".y.parquet", "_tmp/z.parquet", ".git/z.parquet"):
        write(tmp_path / "in" / name)
    (tmp_path / "in" / "README.md").write_text("hello")
    return tmp_path / "in"


def test_a_folder_is_read_recursively_and_hidden_names_are_not(folder: Path) -> None:
    shards = discover(InputSpec(path=(str(folder),))).shards
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
    assert discover(InputSpec(path=("in",))).shards == discover(InputSpec(path=(str(folder),))).shards


def test_an_output_below_the_input_is_not_input(folder: Path) -> None:
    before = names(folder)
    write(folder / "captions" / "data" / "sub" / "a.parquet")
    write(folder / "captions" / "_tessera" / "journal" / "part-0.parquet")
    write(folder / "train" / "data" / "x.parquet")  # a data folder of somebody else's
    for path in (folder, f"{folder}/**/*.parquet", f"{folder}/**"):
        found = discover(InputSpec(path=(str(path),)))
        assert [shard.name for shard in found.shards] == [*before, "train/data/x.parquet"]
        assert found.outputs == (str(folder / "captions"),)
        assert str(folder / "captions") in found.notes()[0]
    with pytest.raises(
        InputError, match=r"no parquet files .* captions of Tessera's own, in .*/captions/data"
    ):
        names(f"{folder}/c*/data/sub/*.parquet")
    # Captions of captions: asked for by name.
    assert names(folder / "captions") == ["data/sub/a.parquet"]
    assert names(folder / "captions/data") == ["sub/a.parquet"]
    assert names(f"{folder}/captions/data/*/*.parquet") == ["sub/a.parquet"]
    assert names(folder / "captions/data/sub/a.parquet") == ["a.parquet"]


def test_a_changed_file_is_a_changed_fingerprint(folder: Path) -> None:
    def prints() -> dict[str, str]:
        return {shard.name: shard.fingerprint for shard in discover(InputSpec(path=(str(folder),))).shards}

    before = prints()
    assert prints() == before
    path = folder / "a.parquet"
    data = bytearray(path.read_bytes())
    data[10] ^= 1  # the same size
    path.write_bytes(data)
    changed = {name for name, value in prints().items() if value != before[name]}
    assert changed == {"a.parquet"}


def test_names_begin_at_the_root_that_is_pinned(folder: Path) -> None:
    def pinned(root: str, *paths: str) -> list[str]:
        return [shard.name for shard in discover(InputSpec(path=paths), root).shards]

    sub, here = f"{folder}/sub", str(folder)
    assert pinned(here, sub) == ["sub/c.parquet", "sub/deep/d.parquet"]
    assert pinned(sub, sub, f"{sub}/deep") == ["c.parquet", "deep/d.parquet"]
    assert pinned(sub, f"{here}/a.parquet") == ["a.parquet"]  # an input of its own
    assert pinned("s3://elsewhere/sub", sub) == ["c.parquet", "deep/d.parquet"]
    with pytest.raises(InputError, match=rf"{here}/a\.parquet lies outside of {sub}, where the names"):
        pinned(sub, sub, f"{here}/a.parquet")


def test_s3(s3_url: str, folder: Path) -> None:
    storage = Storage(s3_url)
    for name in ("b.parquet", "sub/c.parquet", "_x.parquet"):
        storage.put_atomic(f"in/{name}", (folder / name).read_bytes())
    shards = discover(InputSpec(path=(f"{s3_url}/in/",))).shards
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
        found = discover(InputSpec(path=(f"{s3_url}/{path}",))).shards
        assert [shard.name for shard in found] == expected
        assert {shard.fingerprint for shard in found} <= {shard.fingerprint for shard in shards}
    storage.put_atomic("in/b.parquet", (folder / "sub/deep/d.parquet").read_bytes())
    assert discover(InputSpec(path=(f"{s3_url}/in/",))).shards[0].fingerprint != shards[0].fingerprint
    with pytest.raises(InputError, match="nowhere does not exist"):
        discover(InputSpec(path=(f"{s3_url}/nowhere",)))
    storage.put_atomic("in/empty.parquet", b"")
    storage.put_atomic("in/out/data/b.parquet", (folder / "b.parquet").read_bytes())
    storage.put_atomic("in/out/_tessera/spec.json", b"{}")
    for path in ("in", "in/**/*.parquet"):
        whole = discover(InputSpec(path=(f"{s3_url}/{path}",)))
        assert [shard.name for shard in whole.shards] == ["b.parquet", "sub/c.parquet"]
        assert whole.unreadable[0].url == f"{s3_url}/in/empty.parquet"
        assert whole.outputs == (f"{s3_url}/in/out",)


def damaged_footer(good: Path) -> bytes:
    data = good.read_bytes()
    return data[:4] + b"\xff" * (len(data) - 12) + data[-8:]


def test_files_that_cannot_be_read_are_set_apart_by_name(folder: Path) -> None:
    good = names(folder)
    whole = (folder / "a.parquet").read_bytes()
    for name, data in {
        "cut": whole[:-3],
        "empty": b"",
        "footer": damaged_footer(folder / "a.parquet"),
        "text": b"not parquet at all",
    }.items():
        (folder / "sub" / f"{name}.parquet").write_bytes(data)
    found = discover(InputSpec(path=(str(folder),)))
    assert [shard.name for shard in found.shards] == good
    cut, empty, damaged, text = found.unreadable
    assert (empty.name, str(empty)) == ("sub/empty.parquet", f"{folder}/sub/empty.parquet is empty (0 bytes)")
    assert cut.reason == text.reason == "is not a parquet file, or is cut off"
    assert "damaged parquet footer" in damaged.reason


def test_an_input_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match=r"a\.parquet is empty \(0 bytes\) \(and 1 more"):
        names(tmp_path)


def test_a_footer_whose_counts_disagree_is_damaged(folder: Path) -> None:
    path = folder / "big.parquet"
    pq.write_table(pa.table({"image": pa.array([b"x"] * 1000)}), path, row_group_size=500)
    data = path.read_bytes()
    thousand = bytes([0xD0, 0x0F])  # 1,000 as thrift writes it
    assert data.count(thousand) == 1
    path.write_bytes(data.replace(thousand, bytes([0xD0, 0x7F])))
    (lying,) = discover(InputSpec(path=(str(folder),))).unreadable
    assert lying.name == "big.parquet" and "and 1,000 in its row groups" in lying.reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("b.parquet"), "was deleted after it had been listed"),
        (PermissionError("reading b.parquet: permission denied"), "cannot be read (reading b.parquet: perm"),
    ],
)
def test_a_file_that_is_gone_or_forbidden_is_set_apart_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str
) -> None:
    original = footer.read_footer

    def failing(filesystem: object, path: str, size: int) -> pq.FileMetaData:
        if path.endswith("/b.parquet"):
            raise error
        return original(filesystem, path, size)

    monkeypatch.setattr("pipeline.input.shards.read_footer", failing)
    found = discover(InputSpec(path=(str(folder),)))
    assert len(found.shards) == 3
    assert [shard.name for shard in found.unreadable] == ["b.parquet"]
    assert found.unreadable[0].reason.startswith(reason)


def test_storage_that_fails_breaks_the_job_and_blames_no_shard(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> pq.FileMetaData:
        raise StorageError("reading a.parquet: storage failed again and again")

    monkeypatch.setattr("pipeline.input.shards.read_footer", failing)
    with pytest.raises(StorageError, match="again and again"):
        names(folder)


def test_a_footer_larger_than_the_first_read(tmp_path: Path) -> None:
    wide = {f"column_{i}": pa.array([i]) for i in range(2000)}
    write(tmp_path / "wide.parquet", rows=1, **wide)
    assert discover(InputSpec(path=(str(tmp_path),))).shards[0].rows == 1
    assert len(shard_schema(str(tmp_path / "wide.parquet"))) == 2002


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no parquet files found"):
        names(tmp_path)
    (tmp_path / "cats").mkdir()
    for name in ("cats/1.JPG", "2.png", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=r"there are pictures \(2.png and 1 more\): write them to parquet files"
    ):
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


def test_a_job_remembers_the_columns_that_keep_stood_for() -> None:
    old, new = (
        shard_of("a", x=pa.int64(), y=pa.string()),
        shard_of("b", x=pa.int64(), y=pa.string(), z=pa.int8()),
    )
    before = with_kept(spec_of(), job_schema(spec_of(), [old]))
    advised = spec_of(keep=["x", "y"])
    assert before == with_kept(advised, job_schema(advised, [old, new])) == advised


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


def test_links_that_lead_nowhere_or_up_and_odd_names_cost_themselves_alone(tmp_path):
    write(tmp_path / "sub/good.parquet")
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "unmounted/part.parquet")
    (tmp_path / "itself.parquet").symlink_to("itself.parquet")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    latin = os.fsencode(tmp_path) + b"/caf\xe9.parquet"
    with open(latin, "wb") as file:
        file.write((tmp_path / "sub/good.parquet").read_bytes())
    found = discover(InputSpec(path=str(tmp_path)))
    assert [shard.name for shard in found.shards] == ["sub/good.parquet"]
    failed = {shard.name: shard.reason for shard in found.unreadable}
    assert set(failed) == {"gone.parquet", "itself.parquet", "caf\\udce9.parquet"}
    assert "rename it" in failed["caf\\udce9.parquet"]
    assert failed["gone.parquet"] == failed["itself.parquet"] == "is a link that leads nowhere"


def test_links_to_folders_that_hold_each_other_are_followed_once(tmp_path: Path) -> None:
    for here, there in (("a", "b"), ("b", "a")):
        write(tmp_path / f"{here}/{here}.parquet")
        (tmp_path / f"{here}/link").symlink_to(tmp_path / there)
    assert names(tmp_path) == ["a/a.parquet", "a/link/b.parquet", "b/b.parquet", "b/link/a.parquet"]


@pytest.mark.parametrize("name", ["a//b.parquet", "/b.parquet", "a::b.parquet", "a?versionId=b.parquet"])
def test_names_that_no_url_can_hold_are_set_apart(s3_url: str, folder: Path, name: str) -> None:
    storage = Storage(s3_url)
    storage.put_atomic("in/b.parquet", (folder / "b.parquet").read_bytes())
    boto3.client("s3").put_object(Bucket=s3_url[5:], Key=f"in/{name}", Body=b"")
    found = discover(InputSpec(path=(f"{s3_url}/in",)))
    assert [shard.name for shard in found.shards] == ["b.parquet"]
    assert [shard.name for shard in found.unreadable] == [name] and "rename it" in found.unreadable[0].reason
