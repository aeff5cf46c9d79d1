"""The source: the remaining rows and no others, every form of image column, and paths that may not escape."""

import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.schema import ERROR, FINGERPRINT, IMAGES, ROW, SHARD, VIDEO
from pipeline.input.columns import job_schema
from pipeline.input.rows import RowSet
from pipeline.input.shards import discover
from pipeline.input.source import ShardSource, ShardWork, read_shard
from pipeline.spec.job_spec import parse_spec
from pipeline.storage.storage import Storage

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(folder, table: pa.Table, name="a.parquet", row_group_size=10):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    (shard,) = discover(
        parse_spec({"input": {"path": str(folder)}, "model": {"path": "m"}, "output": {"path": "o"}}).input
    ).shards
    return shard


def spec_of(shard, limits=None, **fields):
    given = {"path": shard.root, **fields}
    return parse_spec(
        {"input": given, "model": {"path": "m"}, "output": {"path": "o"}, "limits": limits or {}}
    )


def read(shard, rows=None, columns=("id",), limits=None, **fields) -> list[dict]:
    given = {"path": shard.root, **fields}
    spec = parse_spec(
        {"input": given, "model": {"path": "m"}, "output": {"path": "o"}, "limits": limits or {}}
    )
    work = ShardWork(shard, RowSet.span(shard.rows) if rows is None else RowSet.of(rows))
    return [row for table in read_shard(work, spec, columns) for row in table.to_pylist()]


@pytest.mark.parametrize("rows", [range(35), [0], [9, 10], [34], range(3, 31, 7), []])
def test_only_the_remaining_rows_are_read_in_order(tmp_path, rows):
    shard = write(
        tmp_path, pa.table({"id": range(35), "image": [b"%d" % i for i in range(35)], "big": ["x"] * 35})
    )
    found = read(shard, rows)
    assert [row[ROW] for row in found] == [row["id"] for row in found] == list(rows)
    assert [row[IMAGES] for row in found] == [[b"%d" % row["id"]] for row in found]
    assert all("big" not in row and row[ERROR] is None for row in found)
    assert {row[SHARD] for row in found} <= {"a.parquet"} and {row[FINGERPRINT] for row in found} <= {
        shard.fingerprint
    }


def test_row_groups_with_nothing_to_do_are_not_read(tmp_path, monkeypatch):
    shard = write(tmp_path, pa.table({"id": range(40), "image": [b"x"] * 40}))
    groups = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, row_groups, **kwargs):
        groups.extend(row_groups)
        return original(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    read(shard, [12, 33])
    assert groups == [1, 3]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (pa.array([b"a", None]), [[b"a"], None]),
        (pa.array([b"a", None], pa.large_binary()), [[b"a"], None]),
        (
            pa.array([{"bytes": b"a", "path": "x.png"}, None, {"bytes": None, "path": None}], STRUCT),
            [[b"a"], None, None],
        ),
        (pa.array([[b"a", b"b"], [], [None]], pa.list_(pa.binary())), [[b"a", b"b"], [], None]),
        (pa.array([[{"bytes": b"a", "path": None}], None], pa.list_(STRUCT)), [[b"a"], None]),
    ],
)
def test_every_form_of_image_column(tmp_path, images, expected):
    shard = write(tmp_path, pa.table({"id": range(len(images)), "image": images}))
    rows = read(shard)
    assert [row[IMAGES] for row in rows] == expected
    for row in rows:
        assert (row[ERROR] is None) == (row[IMAGES] is not None)
        if row[ERROR]:
            assert row[ERROR]["kind"] == "decode" and row[ERROR]["stage"] == "read"


def test_a_video_is_a_list_of_frames_of_which_some_are_read(tmp_path):
    (tmp_path / "f.png").write_bytes(b"fetched")
    frame = [
        {"bytes": None, "path": "f.png"},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "gone.png"},
    ]
    inline = [{"bytes": b"%d" % index, "path": None} for index in range(10)]
    cells = [inline, inline[:4], frame[:1], [], None, [inline[0], frame[1]], [frame[2]]]
    images = pa.array([None, b"a", b"a", b"a", None, b"a", b"a"])
    table = pa.table({"image": images, "clip": pa.array(cells, pa.list_(STRUCT))})
    rows = read(write(tmp_path, table), columns=(), video="clip", max_frames=4)
    assert [row[VIDEO] for row in rows[:4]] == [
        [b"0", b"2", b"5", b"7"],
        [b"0", b"1", b"2", b"3"],
        [b"fetched"],
        [],
    ]
    # A null beside a video is no image
    assert [row[IMAGES] for row in rows[:4]] == [
        [],
        [b"a"],
        [b"a"],
        [b"a"],
    ]
    errors = [(row[ERROR]["kind"], row[ERROR]["message"]) for row in rows[4:]]
    assert errors[0] == ("decode", "there is no image: the cell is null")
    assert errors[1] == ("decode", "frame 2 of the video's 2: there is no image: the cell is null")
    assert errors[2][0] == "fetch" and errors[2][1].startswith(
        "frame 1 of the video's 1: image path 'gone.png'"
    )
    assert all(row[IMAGES] is None and row[VIDEO] is None for row in rows[4:])


def test_pictures_travel_once_and_columns_may_be_none(tmp_path):
    shard = write(tmp_path, pa.table({"image": [b"a"] * 3, "clip": pa.array([[b"f"]] * 3)}))
    (row,) = read(shard, [1], columns=(), image=None, video="clip")
    assert (row[IMAGES], row[VIDEO]) == ([], [b"f"]) and "clip" not in row
    (row,) = read(shard, [1], columns=("image",), video=None)
    assert (row["image"], row[IMAGES], row[VIDEO]) == (b"a", [b"a"], [])


def test_images_by_path_are_fetched_from_beside_the_shard(tmp_path):
    (tmp_path / "outside.png").write_bytes(b"secret")
    data = tmp_path / "data"
    (data / "deep" / "pictures").mkdir(parents=True)
    (data / "deep" / "pictures" / "1.png").write_bytes(b"one")
    (data / "top.png").write_bytes(b"top")
    paths = [
        "pictures/1.png",
        "../top.png",
        "gone.png",
        "../../outside.png",
        "/etc/passwd",
        "s3://bucket/x.png",
    ]
    cells = pa.array([{"bytes": None, "path": path} for path in paths], STRUCT)
    shard = write(data, pa.table({"id": range(len(paths)), "image": cells}), "deep/a.parquet")
    rows = read(shard)
    assert rows[0][IMAGES] == [b"one"]
    for row, path in zip(rows[1:], paths[1:], strict=True):
        assert row[IMAGES] is None and row[ERROR]["kind"] == "fetch" and path in row[ERROR]["message"]
    assert rows[4][ERROR]["message"] == (
        "image path '/etc/passwd' leads out of the shard's folder, and images by path are read from there alone: "
        "store their bytes"
    )
    assert not any(b"secret" in str(row).encode() for row in rows)


def test_a_pipe_or_a_device_beside_the_shard_is_not_opened(tmp_path):
    """The one would be waited for, the other read, for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    cells = [{"bytes": None, "path": name} for name in ("pipe.png", "zero.png")]
    errors = [row[ERROR] for row in read(write(tmp_path, pa.table({"id": [0, 1], "image": cells})))]
    assert [error["kind"] for error in errors] == ["fetch", "fetch"]
    assert all(error["message"].endswith("is a pipe, a socket or a device, not a file") for error in errors)


def test_credentials_in_a_picture_s_path_are_not_repeated(tmp_path):
    paths = ["https://me:hush@host/x.png", "https://host/x.png?X-Amz-Signature=hush", "x.png?sig=hush&se=1"]
    cells = pa.array([{"bytes": None, "path": path} for path in paths], STRUCT)
    rows = read(write(tmp_path, pa.table({"image": cells})), columns=())
    messages = [row[ERROR]["message"] for row in rows]
    assert not any("hush" in message for message in messages)
    assert "https://...@host/x.png" in messages[0] and "x.png?..." in messages[2]


def test_a_task_a_shard_with_kept_columns_of_one_type(tmp_path):
    strings = pa.array(["x"]).dictionary_encode()
    pq.write_table(pa.table({"tag": strings, "image": [b"a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"tag": pa.nulls(1), "image": [b"b"]}), tmp_path / "b.parquet")
    spec = parse_spec({"input": {"path": str(tmp_path)}, "model": {"path": "m"}, "output": {"path": "o"}})
    shards = discover(spec.input).shards
    kept = job_schema(spec, shards)
    source = ShardSource([ShardWork(shard, RowSet.span(1)) for shard in shards], spec, ["tag"], kept)
    tasks = source.get_read_tasks(parallelism=200)
    assert [task.metadata.num_rows for task in tasks] == [1, 1]
    blocks = [block for task in tasks for block in task()]
    assert [block["tag"].type for block in blocks] == [pa.string(), pa.string()]
    assert [block[SHARD].to_pylist() for block in blocks] == [["a.parquet"], ["b.parquet"]]


def test_a_shard_that_changed_gives_an_empty_block_like_the_others(tmp_path):
    shard = write(tmp_path, pa.table({"id": range(3), "image": [b"x"] * 3}))
    work, spec = ShardWork(shard, RowSet.span(3)), spec_of(shard)
    (before,) = read_shard(work, spec, ["id"])
    write(tmp_path, pa.table({"id": range(5), "image": [b"y"] * 5}))
    (after,) = read_shard(work, spec, ["id"])
    assert (before.num_rows, after.num_rows) == (3, 0) and after.schema == before.schema


def test_a_picture_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(b"x" * 101)
    (tmp_path / "small.png").write_bytes(b"x" * 100)
    cells = [
        {"bytes": b"x" * 101, "path": None},
        {"bytes": b"x" * 100, "path": None},
        {"bytes": None, "path": "large.png"},
        {"bytes": None, "path": "small.png"},
    ]
    clips = pa.array([[], [], [], [cells[1], cells[2]]], pa.list_(STRUCT))
    shard = write(tmp_path, pa.table({"image": pa.array(cells, STRUCT), "clip": clips}))
    fetched: list[str] = []
    fetch = Storage.read

    def noted(self: Storage, path: str, *rest: int) -> bytes:
        fetched.append(path)
        return fetch(self, path, *rest)

    monkeypatch.setattr(Storage, "read", noted)
    rows = read(shard, columns=(), limits={"max_image_bytes": 100}, video="clip")
    assert [row[IMAGES] for row in rows] == [None, [b"x" * 100], None, None]
    told = "the encoded image has 101 bytes, above limits.max_image_bytes=100"
    assert [row[ERROR] and row[ERROR]["message"] for row in rows] == [
        told,
        None,
        f"image path 'large.png': {told}",
        f"frame 2 of the video's 2: image path 'large.png': {told}",
    ]
    assert {row[ERROR]["kind"] for row in rows if row[ERROR]} == {"too_large"}
    assert not fetched
    read(shard, columns=(), limits={"max_image_bytes": 100})
    assert fetched == ["small.png"]


@pytest.mark.parametrize("by_path", [False, True])
def test_tables_are_cut_by_bytes(tmp_path, monkeypatch, by_path):
    monkeypatch.setattr("pipeline.input.source.READ_BYTES", 1000)
    monkeypatch.setattr("pipeline.input.reading.READ_BYTES", 1000)
    sizes = [100] * 20 + [1500] * 4 + [100] * 20
    for index, size in enumerate(sizes):
        (tmp_path / f"{index}.png").write_bytes(random.Random(index).randbytes(size))
    cells = [
        {"bytes": None, "path": f"{index}.png"}
        if by_path
        else {"bytes": (tmp_path / f"{index}.png").read_bytes(), "path": None}
        for index in range(len(sizes))
    ]
    shard = write(tmp_path, pa.table({"id": range(len(sizes)), "image": pa.array(cells, STRUCT)}))
    tables = list(read_shard(ShardWork(shard, RowSet.span(len(sizes))), spec_of(shard), ["id"]))
    assert [row["id"] for table in tables for row in table.to_pylist()] == list(range(len(sizes)))
    bytes_of = [sum(len(row[IMAGES][0]) for row in table.to_pylist()) for table in tables]
    assert sum(bytes_of) == sum(sizes)
    # By path their sizes are known before; in cells only the row group's average is.
    assert max(bytes_of) <= (1500 if by_path else 4500) and len(tables) >= 8
