"""The checkpoint as the driver looks at it: what is missing, damaged or unfit is told before anything starts."""

from __future__ import annotations

import os

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
