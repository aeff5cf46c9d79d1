"""The checkpoint as the driver looks at it: what is missing, damaged or unfit is told before anything starts.

A checkpoint on the hub is pinned to a commit: a branch moves, and an output that was begun with one commit is finished
with it, on every actor and in every later run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from actors.checkpoint_files import CheckpointError, HubError, check_path
from pipeline.run.outcome import JobError
from pipeline.spec.job_spec import JobSpec, SpecError
from pipeline.storage.files import absolute


def model_path(spec: JobSpec) -> str:
    """A local checkpoint folder by its absolute path: an actor's working folder need not be the driver's."""
    return absolute(spec.model.path) if os.path.isdir(spec.model.path) else spec.model.path


def check_model_path(spec: JobSpec) -> None:
    """Raises SpecError for a folder that is not there, or whose weights are missing or damaged; at once, for it needs
    no model library and no network."""
    try:
        check_path(model_path(spec))
    except CheckpointError as error:
        raise SpecError(f"model.path: {error}") from None


def pinned(spec: JobSpec, bound: Mapping[str, Any]) -> JobSpec:
    """The spec with the commit of a hub checkpoint as its revision: where none is asked for, the commit in `bound`,
    what the output's captions depend on; else, or in a new output, the one that the hub has now.

    Raises as `check_checkpoint` does.
    """
    if os.path.isdir(spec.model.path):
        return spec
    if spec.model.revision is None and bound.get("model.path") == spec.model.path:
        return _at(spec, bound.get("model.revision"))
    from actors.checkpoint_hub import commit_of

    try:
        return _at(spec, commit_of(spec.model.path, spec.model.revision) or spec.model.revision)
    except HubError as error:
        raise JobError(f"model.path: {error}") from None
    except CheckpointError as error:
        raise SpecError(f"model.path: {error}") from None


def moved(asked: JobSpec, spec: JobSpec) -> str:
    """What to tell people where the hub has another commit by now than the pinned one of `spec`; "" where it has not,
    or does not say."""
    if asked.model.revision is not None or spec.model.revision is None:
        return ""
    from actors.checkpoint_hub import commit_of

    with suppress(CheckpointError):
        now = commit_of(spec.model.path, None)
        if now and now != spec.model.revision:
            return (
                f"{spec.model.path} has moved on to commit {now[:12]}; this output goes on with "
                f"{spec.model.revision[:12]}, with which it was begun (for the other, set output.path to a new folder)"
            )
    return ""


def _at(spec: JobSpec, revision: str | None) -> JobSpec:
    return spec.model_copy(update={"model": spec.model.model_copy(update={"revision": revision})})


def check_checkpoint(spec: JobSpec) -> None:
    """Reads the checkpoint's configuration and tokenizer, from the hub where they lie there.

    Raises SpecError for a checkpoint that cannot caption this job, JobError for a hub that does not answer.
    """
    from actors.checkpoint_hub import find_checkpoint

    field = "model.path"
    try:
        path = find_checkpoint(model_path(spec), spec.model.revision)
        from actors.families import load_family  # imports the model libraries, for seconds

        family = load_family(path, spec.model.revision)
        family.check_chat()
        if spec.input.video is not None:
            field = "input.video"
            family.check_videos()
    except HubError as error:
        raise JobError(f"model.path: {error}") from None
    except CheckpointError as error:
        raise SpecError(f"{field}: {error}") from None
