"""`tessera`: the command line. Every command is a thin call into `pipeline`.

Exit codes: 0 done, 1 the job broke, 2 the job spec is wrong (or the arguments are), 3 done but more rows failed
than `limits.max_failed_fraction` allows. Each but 0 comes with one sentence on standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

OK, BROKEN, BAD_SPEC, TOO_MANY_ERRORS = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; bad arguments exit with 2."""
    options = _parser().parse_args(arguments)
    # Imported here, so that `tessera --help` answers at once.
    from pipeline.ledger import LedgerMismatch
    from pipeline.spec import SpecError

    try:
        code: int = options.command(options)
    except (SpecError, LedgerMismatch) as error:
        return _fail(BAD_SPEC, error)
    except KeyboardInterrupt:
        return _fail(
            130, "interrupted; what was captioned so far is kept, and the same command goes on from there"
        )
    except (OSError, RuntimeError) as error:
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
    add_set_option(run)
    run.set_defaults(command=lambda options: run_job(options.spec, options.set))

    status = commands.add_parser("status", help="how far a job is, from its files alone")
    verify = commands.add_parser("verify", help="recount a job: every input row captioned exactly once")
    report = commands.add_parser("report", help="write a contact sheet of pictures and captions (HTML)")
    for command, function in ((status, _status), (verify, _verify), (report, _report)):
        command.add_argument("spec", metavar="JOB.yaml", help="the job spec that was run")
        add_set_option(command)
        command.set_defaults(command=function)
    report.add_argument("-o", "--out", default="report.html", help="the page to write (%(default)s)")
    report.add_argument("--rows", type=int, default=60, help="rows to show (%(default)s)")
    report.add_argument("--truth", metavar="COLUMN", help="kept column to compare captions with")
    return parser


def add_set_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field of the spec, e.g. --set generation.max_new_tokens=64 (repeatable)",
    )


def run_job(spec_path: str, overrides: Sequence[str]) -> int:
    """Captions the rows that have no caption yet and seals finished shards. Safe to repeat and to kill."""
    from pipeline.spec import load_spec

    spec = load_spec(spec_path, overrides)  # before the slow imports: a typo is told at once

    from pipeline.dataflow import run
    from pipeline.progress import display

    with display(spec.name, sys.stderr) as show:
        outcome = run(spec, show)
    print(outcome.describe())
    if outcome.failed_fraction > spec.limits.max_failed_fraction:
        return _fail(
            TOO_MANY_ERRORS,
            f"{outcome.errors:,} of {outcome.rows:,} rows failed ({outcome.failed_fraction:.1%}), more than "
            f"limits.max_failed_fraction={spec.limits.max_failed_fraction:g} allows; all captions are in the output",
        )
    return OK


def _status(options: argparse.Namespace) -> int:
    from pipeline.dataflow import status
    from pipeline.spec import load_spec

    print(status(load_spec(options.spec, options.set)))
    return OK


def _verify(options: argparse.Namespace) -> int:
    from pipeline.ledger import Ledger
    from pipeline.shards import discover
    from pipeline.spec import load_spec

    spec = load_spec(options.spec, options.set)
    verification = Ledger(spec.output.path).verify(discover(spec.input))
    print(verification.describe())
    return OK if verification.ok else BROKEN


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from pipeline.ledger import Ledger
    from pipeline.report import render
    from pipeline.report_reader import read_section
    from pipeline.spec import load_spec

    spec = load_spec(options.spec, options.set)
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
