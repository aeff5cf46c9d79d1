"""A job named by its output: `tessera status s3://bucket/captions/` needs no job spec at hand.

An output knows its job. `_tessera/spec.json` holds the spec of the last run, with local paths absolute,
so whoever can read the output can look at it, recount it and go on with it. Where the output was moved or copied to,
it is itself that counts, not the path in the file.
"""

from collections.abc import Sequence

from pipeline.ledger.identity import recorded
from pipeline.ledger.ledger import SPEC
from pipeline.spec.job_spec import JobSpec, SpecError, apply_override, load_spec, parse_spec
from pipeline.spec.secrets import WHERE_THEY_BELONG, holds_credentials
from pipeline.storage.retrying import with_retries
from pipeline.storage.storage import Storage


def load_job(target: str, overrides: Sequence[str] = ()) -> JobSpec:
    """The spec of a job named by its output folder, or by its spec (`.yaml`, `.yml`). Raises SpecError."""
    if target.endswith((".yaml", ".yml")):
        return load_spec(target, overrides)
    if holds_credentials(target):
        raise SpecError(f"{target}: {WHERE_THEY_BELONG}")
    storage = Storage(target)
    source = f"{storage.url}/{SPEC}"
    try:
        data = recorded(storage.read(SPEC), source)["spec"]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        there = with_retries(lambda: storage.filesystem.exists(storage.url), f"reading {storage.url}")
        why = f"it has no {SPEC}" if there else "there is nothing of that name"
        raise SpecError(f"{target}: is no job spec (.yaml) and no output of Tessera's, for {why}") from None
    data["output"]["path"] = storage.url
    try:
        parse_spec(data, source)
    except SpecError as error:
        raise SpecError(
            f"{str(error).splitlines()[0]}: the output was made by another version of Tessera, which can read it"
        ) from None
    for override in overrides:
        apply_override(data, override)
    return parse_spec(data, source)
