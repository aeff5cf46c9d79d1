"""The input as its output knows it: shards keep the names and fingerprints that earlier runs gave them.

Why: a row is known by its shard's name and fingerprint. The name begins at the input's root, so a second folder in
input.path would rename every shard and buy all captions twice; and a touched file would have another fingerprint. The
root is therefore taken from spec.json, and changed shards are compared with what their files were (content.py).
"""

from collections.abc import Callable
from dataclasses import replace

from actors.schema import READ
from pipeline.input.shards import Input, discover
from pipeline.ledger.content import known_version, remember_version
from pipeline.ledger.identity import recorded
from pipeline.ledger.ledger import DATA, JOURNAL, SPEC, Ledger
from pipeline.spec.job_spec import JobSpec, SpecError
from pipeline.storage.files import in_parallel
from pipeline.storage.retrying import MissingBucket

_NAMED = 3  # shards in a message


def listed_input(spec: JobSpec, ledger: Ledger) -> Input:
    """`discover`, with names that begin where those of the output's captions do."""
    return discover(spec.input, _pinned_root(ledger))


def recognised(
    found: Input, ledger: Ledger, read: bool = True, say: Callable[[str], object] = lambda _: None
) -> Input:
    """The input with its touched and copied shards under the fingerprints that the output has of them.

    Files that may be such are read whole, or, unless `read`, taken to be if their size is the same.
    """
    changed = set(ledger.plan(found.shards).changed)
    if not changed:
        return found
    say(f"comparing {len(changed):,} shards whose files have changed")
    known = in_parallel(
        lambda shard: known_version(ledger.storage, shard, read) if shard.name in changed else (shard, False),
        found.shards,
    )
    return replace(
        found,
        shards=tuple(shard for shard, _ in known),
        touched=tuple(shard.name for shard, news in known if news),
    )


def remember(found: Input, ledger: Ledger) -> None:
    """Puts down what `recognised` found by reading, so that it is read once."""
    touched = [shard for shard in found.shards if shard.name in found.touched]
    in_parallel(lambda shard: remember_version(ledger.storage, shard), touched)


def refuse_recaption(spec: JobSpec, found: Input, ledger: Ledger) -> None:
    """Raises SpecError where changed shards hold more than `limits.max_recaption_fraction` of the rows captioned.

    Shards with rows that could not be read do not count: that somebody repairs them is what they wait for.
    """
    scan, current = ledger.scan(), {shard.name: shard.fingerprint for shard in found.shards}
    rows: dict[str, int] = {}
    valid = 0
    for file in (*scan.sealed.values(), *scan.parts):
        for name, entry in file.entries.items():
            captioned = entry.stats.rows - entry.stats.failed
            if current.get(name) == entry.fingerprint:
                valid += captioned
            elif name in current and READ not in entry.stats.errors:
                rows[name] = rows.get(name, 0) + captioned
    lost, limit = sum(rows.values()), spec.limits.max_recaption_fraction
    if lost > limit * (lost + valid):
        names = ", ".join(sorted(rows)[:_NAMED]) + (", ..." if len(rows) > _NAMED else "")
        raise SpecError(
            f"input.path: {len(rows):,} shards changed since they were captioned ({names}); {lost:,} of the "
            f"{lost + valid:,} rows captioned would be captioned again, more than "
            f"limits.max_recaption_fraction={limit:g} allows; run with --recaption-changed if that is meant, or put "
            "the files back"
        )


def _pinned_root(ledger: Ledger) -> str | None:
    """Where names begin in the output; None where it has no captions, so that they may begin anywhere. Raises SpecError
    where spec.json is damaged."""
    try:
        record = recorded(ledger.storage.read(SPEC), f"{ledger.storage.url}/{SPEC}")
    except (FileNotFoundError, NotADirectoryError, MissingBucket):  # Ledger.check tells the latter two
        return None
    held = any(ledger.storage.list(folder) for folder in (DATA, JOURNAL))
    return str(record["root"]) if held and record.get("root") else None
