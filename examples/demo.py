"""`make demo`: the main job, for all four model families, on a machine with no GPU and no model hub.

Writes toy scenes, captions them with each family's toy checkpoint by the very jobs in examples/*.yaml, prints what
came of it and leaves out/demo/report.html, a page of pictures with their captions.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.toy.dataset import write_dataset
from examples.toy.vocabulary import LANGUAGES
from pipeline.dataflow import run
from pipeline.report.page import Section, render
from pipeline.report.reader import read_section
from pipeline.run.outcome import Outcome
from pipeline.run.progress import display
from pipeline.spec.job_spec import JobSpec, load_spec

EXAMPLES = Path(__file__).parent
FAMILIES = tuple(LANGUAGES)


def main() -> int:
    """Runs the demo; a job that breaks raises."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to fill (%(default)s)")
    parser.add_argument("--rows", type=int, default=200, help="rows for each family (%(default)s)")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    shutil.rmtree(options.out, ignore_errors=True)
    began = time.monotonic()
    results = [_job(family, options.out, options.rows) for family in FAMILIES]
    page = options.out / "report.html"
    page.write_text(render([section for _, section in results], title="Tessera demo"), encoding="utf-8")
    Console().print(_summary(results))
    print(f"{time.monotonic() - began:.0f} s in all. Now open {page}")
    return 0


def _job(family: str, out: Path, rows: int) -> tuple[Outcome, Section]:
    data = out / "data" / family
    write_dataset(data, rows=rows, shards=4, seed=11, corrupt=0.05, languages=LANGUAGES[family])
    spec: JobSpec = load_spec(
        EXAMPLES / f"{family}.yaml",
        [f"input.path={data}", f"output.path={out / family}"],
    )
    with display(spec.name, sys.stderr) as show:
        outcome = run(spec, show)
    return outcome, read_section(spec, truth="truth", seconds=outcome.seconds)


def _summary(results: list[tuple[Outcome, Section]]) -> Table:
    table = Table(title="Tessera demo")
    table.add_column("job")
    for heading in ("rows", "errors", "rows/s", "tokens/s", "true"):
        table.add_column(heading, justify="right")
    for outcome, section in results:
        stats = section.stats
        table.add_row(
            outcome.name,
            f"{outcome.rows:,}",
            f"{outcome.errors:,}",
            f"{outcome.captioned / outcome.seconds:.1f}",
            f"{outcome.generated_tokens / outcome.seconds:.0f}",
            f"{stats.right / stats.judged:.1%}" if stats.judged else "-",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
