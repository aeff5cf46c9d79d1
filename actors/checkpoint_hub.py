"""Finds a checkpoint on the Hugging Face hub, or says what is wrong: the name, the access, or the hub.

Why: huggingface_hub tries an unreachable hub six times in half a minute and reports each of them, and transformers
then takes what it could not ask for as missing. Here the first question is asked quietly and answered in seconds.
Imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import re
import time

from huggingface_hub import (
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from actors.checkpoint_files import (
    CONFIG,
    CheckpointError,
    HubError,
    did_you_mean,
    no_config,
    no_weights,
    read_object,
    weight_files,
)

_ANSWER_SECONDS = 5  # of waiting for an answer to a question of a few hundred bytes
_PAUSE_SECONDS = 1  # before the one second try


_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(path: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a hub id stands for now (None: of the default branch).

    Where the hub does not tell, it is what the cache of an earlier download holds. None where the hub, a mirror
    perhaps, knows no commits. Raises as `find_checkpoint` does.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    try:
        config = _metadata(path, CONFIG, revision)
        if config is None:
            raise no_config(path)
        return config.commit_hash
    except (CheckpointError, RevisionNotFoundError) as error:
        raise _explained(error, path, revision) from error
    except Exception as error:  # what the HTTP client raises depends on the version of huggingface_hub
        cached = try_to_load_from_cache(path, CONFIG, revision=revision)
        if isinstance(cached, str):
            return os.path.basename(os.path.dirname(cached))
        raise _explained(error, path, revision) from error


def find_checkpoint(path: str, revision: str | None) -> str:
    """Where to read a checkpoint from: a folder or hub id as it is, once the hub has told that its files are there.

    Where the hub does not give them and the cache of an earlier download does: the id's folder in the cache. Raises
    CheckpointError where the hub's answer is no, HubError where there is none.
    """
    if os.path.isdir(path):
        return path
    try:
        if not _has(path, CONFIG, revision):
            raise no_config(path)
        folder = os.path.dirname(hf_hub_download(path, CONFIG, revision=revision))
        names = weight_files(read_object(folder, CONFIG) or {})
        if not any(_has(path, name, revision) for name in names):
            raise no_weights(path, names)
    except (CheckpointError, RevisionNotFoundError) as error:
        raise _explained(error, path, revision) from error
    except Exception as error:  # what the HTTP client raises depends on the version of huggingface_hub
        cached = try_to_load_from_cache(path, CONFIG, revision=revision)
        if isinstance(cached, str):
            return os.path.dirname(cached)
        raise _explained(error, path, revision) from error
    return path


def _has(path: str, name: str, revision: str | None) -> bool:
    return _metadata(path, name, revision) is not None


def _metadata(path: str, name: str, revision: str | None) -> HfFileMetadata | None:
    """What the hub says of a file, None where there is no such file. Raises what huggingface_hub raises; a passing
    fault only the second time."""
    url = hf_hub_url(path, name, revision=revision)
    try:
        try:
            return get_hf_file_metadata(url, timeout=_ANSWER_SECONDS)
        except Exception as error:
            if not _may_pass(error):
                raise
            time.sleep(_PAUSE_SECONDS)
            return get_hf_file_metadata(url, timeout=_ANSWER_SECONDS)
    except EntryNotFoundError:
        return None


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled)


def _explained(error: Exception, path: str, revision: str | None) -> CheckpointError:
    hub = constants.ENDPOINT
    missing = f"{path}: no such folder here{did_you_mean(path)}, and"
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{path}: {hub} gives this gated checkpoint to accounts with access only; "
            f"ask for access at {hub}/{path}, and set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(
            f"{path}: {hub} has no revision {revision!r} of it; "
            "set model.revision to a branch, a tag or a commit, or leave it out"
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{missing} {hub} has no such checkpoint, or a private one: check the name, or set HF_TOKEN"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(
            f"{missing} not in the cache at {constants.HF_HUB_CACHE}; "
            "HF_HUB_OFFLINE is set: unset it, or download the checkpoint first"
        )
    if isinstance(error, HfHubHTTPError):
        status = f"{error.response.status_code} {error.response.reason_phrase}"
        said = f": {' '.join(error.server_message.split())}" if error.server_message else ""
        if isinstance(error, DisabledRepoError) or error.response.status_code in (401, 403):
            return CheckpointError(f"{path}: {hub} refuses it ({status}{said}); check its page, and HF_TOKEN")
        return HubError(f"{missing} {hub} fails to answer ({status}{said}); try again later")
    return HubError(
        f"{missing} the hub cannot be reached at {hub} ({' '.join(str(error).split()) or type(error).__name__}); "
        "check the network, or name a local folder"
    )
