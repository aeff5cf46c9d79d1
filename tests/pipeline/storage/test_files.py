"""How stores name the versions of a file."""

import fsspec
from huggingface_hub import HfFileSystem
from huggingface_hub.hf_api import RepoFile

from pipeline.storage.files import file_info


def test_a_file_on_the_hub_is_told_from_another_of_the_same_size(monkeypatch) -> None:
    """Its listings have neither etag nor time; the git blob, which changes with the content, is its version."""

    def told(blob: str) -> str:
        filesystem = HfFileSystem(skip_instance_cache=True, use_listings_cache=False)
        file = RepoFile(path="a.parquet", size=3, oid=blob)
        monkeypatch.setattr(filesystem._api, "get_paths_info", lambda *_, **__: [file])
        monkeypatch.setattr(filesystem._api, "list_repo_tree", lambda *_, **__: [file])
        monkeypatch.setattr(filesystem, "_repo_and_revision_exist", lambda *_: (True, None))
        path = "datasets/org/name/a.parquet"
        return file_info(filesystem, path, filesystem.info(path)).token

    assert told("1f") == "1f" and told("2f") == "2f"


def test_a_store_that_tells_no_version_has_none() -> None:
    assert file_info(fsspec.filesystem("memory"), "a", {"name": "a", "size": 3}).token == ""
