"""`tessera`: the command line. Every command is a thin call into `pipeline`.

Exit codes: 0 done, 1 the job broke, 2 the job spec is wrong (or its checkpoint or the arguments are), 3 more rows or
shards failed than `limits` allows, at the end or (`limits.stop_after_failures`) at once, 4 another run holds the output
(or took it over), 5 stopped by SIGTERM, 130 by Ctrl-C. Each but 0 comes with one sentence on standard error.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from actors.errors import ErrorKind

if TYPE_CHECKING:
    from pipeline.run.outcome import Outcome
    from pipeline.spec.job_spec import JobSpec

OK, BROKEN, BAD_SPEC, TOO_MANY_FAILED, HELD, STOPPED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; bad arguments exit with 2."""
    options = _parser().parse_args(arguments)
    # Imported here, so that `tessera --help` answers at once.
    from pipeline.ledger.ledger import LedgerMismatch
    from pipeline.run.failing import AllFailed
    from pipeline.run.stop import Stopped
    from pipeline.spec.job_spec import SpecError
    from pipeline.storage.files import BadUrl
    from pipeline.storage.lease import LeaseHeld, LeaseLost
    from pipeline.storage.retrying import MissingBucket

    try:
        code: int = options.command(options)
    except (SpecError, LedgerMismatch, MissingBucket, BadUrl) as error:
        return _fail(BAD_SPEC, error)
    except (LeaseHeld, LeaseLost) as error:
        return _fail(HELD, error)
    except AllFailed as error:
        return _fail(TOO_MANY_FAILED, error)
    except Stopped as stop:
        return _fail(INTERRUPTED if stop.number == signal.SIGINT else STOPPED, stop)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")
    except OSError as error:
        of_a_file = error.filename and error.strerror
        return _fail(BROKEN, f"{error.filename}: {error.strerror}" if of_a_file else error)
    except RuntimeError as error:
        return _fail(BROKEN, error)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tessera",
        description="Caption image datasets with vision-language models on Ray: parquet in, parquet out.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a job, or go on with one", description=run_job.__doc__)
    run.add_argument("spec", metavar="JOB.yaml", help="the job spec: a file or any fsspec URL")
    run.add_argument(
        "--recaption-changed",
        action="store_true",
        help="caption changed shards anew, however many (limits.max_recaption_fraction)",
    )
    run.set_defaults(command=run_job)

    retry = commands.add_parser("retry", help="try error rows again", description=retry_job.__doc__)
    retry.add_argument(
        "--only",
        required=True,
        metavar="KIND[,KIND]",
        help=f"kinds of errors: {', '.join(get_args(ErrorKind))}",
    )
    retry.set_defaults(command=retry_job)
    for command in (run, retry):
        command.add_argument(
            "--take-over",
            action="store_true",
            help="take the output from the run that holds it; it then ends",
        )

    status = commands.add_parser("status", help="how far a job is, from its files alone")
    verify = commands.add_parser(
        "verify", help="recount a job: every input row captioned exactly once", description=_verify.__doc__
    )
    verify.add_argument(
        "--deep", action="store_true", help="read every page, and hold each row against what was sealed"
    )
    report = commands.add_parser("report", help="write a contact sheet of pictures and captions (HTML)")
    status.set_defaults(command=_status)
    verify.set_defaults(command=_verify)
    report.set_defaults(command=_report)
    for command in (retry, status, verify, report):
        command.add_argument("spec", metavar="OUT", help="the job's output, or the job spec that was run")
    for command in (run, retry, status, verify, report):
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="override a field of the spec, e.g. --set generation.max_new_tokens=64 (repeatable)",
        )
    report.add_argument("-o", "--out", default="report.html", help="the page to write (%(default)s)")
    report.add_argument("--rows", type=int, default=60, help="rows to show (%(default)s)")
    report.add_argument("--truth", metavar="COLUMN", help="kept column to compare captions with")
    return parser


def run_job(options: argparse.Namespace) -> int:
    """Captions the rows that have no caption yet and seals finished shards. Safe to repeat and to kill."""
    from pipeline.spec.job_spec import load_spec

    spec = load_spec(options.spec, options.set)  # before the slow imports: a typo is told at once

    from pipeline.dataflow import run
    from pipeline.run.progress import display

    with display(spec.name, sys.stderr) as show:
        outcome = run(spec, show, options.take_over, options.recaption_changed)
    return _told(spec, outcome)


def retry_job(options: argparse.Namespace) -> int:
    """Tries the error rows of some kinds again and puts the results in their place; no other row is touched."""
    from pipeline.ledger.load_job import load_job

    kinds = tuple(kind.strip() for kind in options.only.split(","))
    unknown = [kind for kind in kinds if kind not in get_args(ErrorKind)]
    if unknown:
        known = ", ".join(get_args(ErrorKind))
        return _fail(BAD_SPEC, f"--only: there is no kind of error {unknown[0]!r}; there are {known}")
    spec = load_job(options.spec, options.set)

    from pipeline.dataflow import retry
    from pipeline.run.progress import display

    with display(spec.name, sys.stderr) as show:
        outcome = retry(spec, kinds, show, options.take_over)
    return _told(spec, outcome)


def _told(spec: JobSpec, outcome: Outcome) -> int:
    print(outcome.describe())
    failure = outcome.failure(spec.limits)
    return _fail(TOO_MANY_FAILED, failure) if failure else OK


def _status(options: argparse.Namespace) -> int:
    from pipeline.ledger.load_job import load_job
    from pipeline.report.status import status

    print(status(load_job(options.spec, options.set)))
    return OK


def _verify(options: argparse.Namespace) -> int:
    """Recounts a job from the footers of its files: whether each row of each shard, as it is now, is in a sealed file
    exactly once, and each sealed file as long as it was written. --deep reads every page as well."""
    from pipeline.ledger.job_input import listed_input, recognised
    from pipeline.ledger.ledger import Ledger
    from pipeline.ledger.load_job import load_job
    from pipeline.run.outcome import shards_told

    spec = load_job(options.spec, options.set)
    ledger = Ledger(spec.output.path)
    found = recognised(listed_input(spec, ledger), ledger)
    verification = ledger.verify(found.shards, found.unreadable, deep=options.deep)
    print(verification.describe())
    if not options.deep:
        print("  by the files' footers; --deep reads every page")
    if not verification.ok:
        return _fail(
            BROKEN,
            f"{spec.output.path} is not what its input asks for, as said above; `tessera run` does what is missing",
        )
    if len(found.unreadable) > spec.limits.max_failed_shards:
        return _fail(TOO_MANY_FAILED, f"{shards_told(found.unreadable)}: repair or remove them and run again")
    return OK


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from pipeline.ledger.ledger import Ledger
    from pipeline.ledger.load_job import load_job
    from pipeline.report.page import render
    from pipeline.report.reader import read_section

    spec = load_job(options.spec, options.set)
    seconds = sum(run["seconds"] for run in Ledger(spec.output.path).runs()) or None
    section = read_section(spec, limit=options.rows, truth=options.truth, seconds=seconds)
    page = render([section], title=spec.name)
    Path(options.out).write_text(page, encoding="utf-8")
    print(f"wrote {options.out}")
    return OK


def _fail(code: int, message: object) -> int:
    print(f"tessera: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
