"""Storage: whole files or none, on a local disk and on a real HTTP S3 server; nothing leaves the root."""

import errno
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage.files import in_parallel
from pipeline.storage.local import write_temporary
from pipeline.storage.storage import Storage, StoragePathError
from tests.pipeline.ledgers import HeldUpStorage


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(
        str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3_url") + "/out"
    )


def test_put_read_list_delete(storage: Storage) -> None:
    assert storage.list() == []
    assert not storage.exists("a/b.bin")
    storage.put_atomic("a/b.bin", b"one")
    storage.put_atomic("a/c/d [x]*.bin", b"12345")
    assert storage.read("a/b.bin") == b"one"
    assert storage.read("a/c/d [x]*.bin", 1, 3) == b"23"
    with storage.open("a/b.bin") as file:
        assert file.read() == b"one"
    assert [(info.path, info.size) for info in storage.list()] == [("a/b.bin", 3), ("a/c/d [x]*.bin", 5)]
    assert [info.path for info in storage.list("a/c")] == ["a/c/d [x]*.bin"]
    assert storage.list("nothing") == []
    before = storage.list("a")[0].token
    storage.put_atomic("a/b.bin", b"two")
    assert storage.read("a/b.bin") == b"two"
    assert storage.list("a")[0].token != before
    storage.delete(["a/b.bin", "a/c/d [x]*.bin", "a/never-there"])
    assert storage.list() == []
    with pytest.raises(FileNotFoundError):
        storage.read("a/b.bin")


def test_s3_deletes_a_thousand_keys_in_a_request(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(s3_url)
    for name in ("a/1", "a/2 [x]*&.bin"):
        storage.put_atomic(name, b"x")
    calls: list[int] = []
    call_s3 = type(storage.filesystem).call_s3

    def counted(self: object, method: str, **kwargs: Any) -> Any:
        if method == "delete_objects":
            calls.append(len(kwargs["Delete"]["Objects"]))
        return call_s3(self, method, **kwargs)

    monkeypatch.setattr(type(storage.filesystem), "call_s3", counted)
    storage.delete(["a/1", "a/2 [x]*&.bin", *(f"gone/{number}" for number in range(1200))])
    assert sorted(calls) == [202, 1000]
    assert storage.list() == []


@pytest.mark.parametrize(("code", "kind"), [("AccessDenied", PermissionError), ("InternalError", None)])
def test_a_key_that_s3_could_not_delete_is_no_success(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, code: str, kind: type[Exception] | None
) -> None:
    """S3 answers 200 and says of single keys that they are still there."""
    storage = Storage(s3_url)
    for name in ("a", "b"):
        storage.put_atomic(name, b"x")
    call_s3 = type(storage.filesystem).call_s3
    refused = [{"Key": "a", "Code": code, "Message": "not now"}]

    def refusing(self: object, method: str, **kwargs: Any) -> Any:
        if method == "delete_objects" and refused:
            return {"Errors": [refused.pop()]}
        return call_s3(self, method, **kwargs)

    monkeypatch.setattr(type(storage.filesystem), "call_s3", refusing)
    if kind:
        with pytest.raises(kind, match="not now"):
            storage.delete(["a", "b"])
    else:
        storage.delete(["a", "b"])
        assert storage.list() == []


def test_listings_are_never_stale(storage: Storage) -> None:
    other = Storage(storage.url)
    for n in range(3):
        other.put_atomic(f"j/{n}", b"x")
        assert len(storage.list("j")) == n + 1
        assert storage.exists(f"j/{n}")
    other.delete(["j/0"])
    assert not storage.exists("j/0")
    assert len(storage.list("j")) == 2


def test_create_exclusive_has_one_winner(storage: Storage) -> None:
    start = threading.Barrier(6)

    def create(contender: int) -> bool:
        start.wait(10)
        return Storage(storage.url).create_exclusive("lease.json", b"mine: %d" % contender)

    answers = in_parallel(create, range(6))
    assert sorted(answers) == [False] * 5 + [True]
    assert storage.read("lease.json") == b"mine: %d" % answers.index(True)
    assert [info.path for info in storage.list()] == ["lease.json"]


def test_a_file_is_swapped_only_for_the_version_that_was_read(storage: Storage) -> None:
    storage.put_atomic("x", b"one")
    data, version = storage.read_version("x")
    assert data == b"one"
    answers = in_parallel(lambda n: storage.put_if("x", b"two: %d" % n, version), range(6))
    assert sorted(answers) == [False] * 5 + [True]
    assert storage.read("x") == b"two: %d" % answers.index(True)
    storage.delete(["x"])
    assert not storage.put_if("x", b"three", version)
    with pytest.raises(FileNotFoundError):
        storage.read_version("x")


def test_every_attempt_of_a_write_asks_the_guard_and_its_refusal_is_final(storage: Storage) -> None:
    asked: list[str] = []

    def guard() -> None:
        asked.append("may I?")
        if len(asked) >= 4:
            raise RuntimeError("no more")

    guarded = HeldUpStorage(storage.url, end="reset", guard=guard)
    guarded.put_atomic("x", b"1")
    assert guarded.read("x") == b"1" and len(asked) == 2  # once for the attempt that was reset
    assert not guarded.create_exclusive("x", b"2")  # and who is refused is told why
    assert len(asked) == 3
    for paths in (["x"], ["x", "y"]):  # one by one, and on S3 many in a request
        with pytest.raises(RuntimeError, match="no more"):
            guarded.delete(paths)
    assert guarded.exists("x")


def test_storage_travels(storage: Storage) -> None:
    storage.put_atomic("x", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy == storage
    assert copy.read("x") == b"1"
    assert len(pickle.dumps(storage)) < 300


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/"])
def test_nothing_leaves_the_root(tmp_path: Path, path: str) -> None:
    storage = Storage(str(tmp_path / "root"))
    for action in (storage.read, storage.exists, storage.open, lambda p: storage.put_atomic(p, b"")):
        with pytest.raises(StoragePathError):
            action(path)


def test_a_relative_root_means_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("out")
    monkeypatch.chdir("/")
    storage.put_atomic("x", b"1")
    assert (tmp_path / "out" / "x").read_bytes() == b"1"


def test_a_failed_write_leaves_the_old_file_and_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    storage.put_atomic("x", b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            storage.put_atomic("x", b"new")
    assert storage.read("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_what_a_killed_writer_left_is_hidden_then_deleted(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put_atomic("j/x", b"1")
    write_temporary(tmp_path / "j/y", b"torn")  # what remains when the process dies before the rename
    assert [info.path for info in storage.list()] == ["j/x"]
    storage.delete_temporary("j")
    assert len(os.listdir(tmp_path / "j")) == 2  # young: its writer may live
    storage.delete_temporary("j", older_than=-1)
    assert os.listdir(tmp_path / "j") == ["x"]


def test_a_large_object_is_one_atomic_put(s3_url: str) -> None:
    storage = Storage(s3_url)
    data = os.urandom(1 << 20) * 110  # above s3fs's limit for a single put: a multipart upload
    storage.put_atomic("large", data)
    assert storage.read("large") == data


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_hard_links_still_has_one_creator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.link", link)
    storage = Storage(str(tmp_path))
    done = in_parallel(lambda number: storage.create_exclusive("a/lease", b"%d" % number), range(16))
    assert sum(done) == 1 and storage.read("a/lease") == b"%d" % done.index(True)
    assert os.listdir(tmp_path / "a") == ["lease"]
