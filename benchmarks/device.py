"""One command for a machine with a GPU, which needs no network and no Ray: does the engine work there, and how fast?

    python -m benchmarks.device --quick                       # two minutes: LLaVA-OneVision 0.5b and 7b
    python -m benchmarks.device                               # all four families, each part in under nine minutes
    python -m benchmarks.device --device cpu --size toy       # the same on any machine

Parts: `tests` (those marked `cuda`), `proof` (an engine a family: what it runs on, and why) and `engine` (the table).
Every line is printed and appended to benchmarks/results/device-<name>.md at once, so that a cut-off loses nothing.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import actors  # noqa: F401  (hides a torchvision that does not match torch)
from actors.engine.devices.base import device_name
from actors.engine.failures import device_is_lost
from actors.families import FAMILIES
from benchmarks.device_meter import device_rates
from benchmarks.device_models import (
    CPU_BATCHES,
    CPU_ROWS,
    CUDA_BATCHES,
    FULL_ROWS,
    QUICK_ROWS,
    ModelBench,
    Plan,
    free_memory,
)
from benchmarks.device_report import LogLines, Report, Result, table
from benchmarks.engine_models import sizes_of
from benchmarks.engine_workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "proof", "engine")
QUICK_SECONDS = 150.0
FIRST_MODEL_SECONDS = 20.0
"""What a model is taken to cost before one was measured."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options().parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = device_name(device)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    budget = options.budget or (QUICK_SECONDS if options.quick else None)
    report = Report(options.out / f"device-{slug}.md", budget)
    about = {
        "benchmark": "device",
        "commit": options.commit or _commit(),
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "rounds": options.rounds,
    }
    report.write(f"# {name}\n\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    handler, log = LogLines(report), logging.getLogger("actors")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # The table's engines are proven too: a part of its own is for a look before the table.
    parts = (options.parts or ("tests,engine" if options.quick else ",".join(PARTS))).split(",")
    summary: dict[str, object] = {}
    try:
        if "tests" in parts:
            report.begin_part("tests")
            summary["tests"] = _tests(report)
        for part in ("proof", "engine"):
            if part in parts:
                report.begin_part(part)
                summary[part] = _models(part, options, device, dtype, report)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    report.write("")
    report.write(json.dumps({**about, **summary}))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="LLaVA-OneVision alone, fewer rows and batches")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--size", help="toy, mini, 0.5b or 7b; 0.5b and 7b unless given")
    parser.add_argument("--parts", help=f"of {','.join(PARTS)}; all unless given (--quick: tests,engine)")
    parser.add_argument("--families", help="all unless given")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument(
        "--systems", default="generate,vllm", help="beside tessera; vllm only where it is found"
    )
    parser.add_argument("--vllm-python", help="an interpreter that has vllm; else this one, if it has")
    parser.add_argument("--rows", type=int, help="rows a workload; else what keeps the device full")
    parser.add_argument("--rounds", type=int, default=1, help="passes, of which the fastest counts")
    parser.add_argument(
        "--budget", type=float, help="seconds for the whole run: no case starts when they are spent"
    )
    parser.add_argument("--profile", action="store_true", help="print the costliest kernels of some steps")
    parser.add_argument("--commit", help="named in the report; else what git says")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the report"
    )
    return parser


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _tests(report: Report) -> str:
    """The last line of pytest over the tests marked `cuda`; failures are written in full."""
    # Not the project's own options: this machine may lack the plugins they name.
    options = [
        "-m",
        "cuda",
        "-q",
        "-rs",
        "-o",
        "addopts=--import-mode=importlib",
        "--continue-on-collection-errors",
    ]
    command = [sys.executable, "-m", "pytest", "tests/actors", *options]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(1.0, report.left)
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if error.stdout else ""
        report.write(f"```\n{said[-4000:]}\n```")
        report.say("the time is spent; the tests were stopped")
        return "stopped"
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    if done.returncode:
        report.write("```\n" + "\n".join(lines[-150:]) + "\n```")
    report.say(f"pytest -m cuda: {lines[-1]}")
    return lines[-1]


def _models(
    part: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype, report: Report
) -> dict[str, object]:
    """Each model in turn: its engine's record and, in the part `engine`, its lines of the table."""
    results: list[Result] = []
    records: dict[str, object] = {}
    left_out: list[str] = []
    plan = _plan(options, device)
    if part == "engine":
        peak = device_rates(device, dtype)
        rates = f"{peak.flops / 1e12:.4g} TFLOP/s, {peak.bandwidth / 1e9:.4g} GB/s"
        report.say(f"the device's peaks, of a large product and a copy: {rates}")
    longest = FIRST_MODEL_SECONDS if device.type == "cuda" else 0.0
    models = _chosen(options)
    for index, (family, size) in enumerate(models):
        name = f"{family} {size}"
        if report.left < longest:
            report.say(f"{name} is not begun: the time is nearly spent")
            left_out.append(name)
            continue
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            bench = None
            try:
                bench = ModelBench(family, size, Path(folder), device, dtype, report)
                record = bench.measure(plan, peak) if part == "engine" else bench.prove()[1]
                records[name] = asdict(record)
            except Exception:  # one model's failure is no reason to know nothing of the others
                report.say(f"{name} failed")
                report.block(traceback.format_exc())
            results += bench.results if bench is not None else []
            engine = bench.engine if bench is not None else None
            del bench
        if device_is_lost(device):
            report.say("the device is lost to this process: run the others again")
            left_out += [f"{family} {size}" for family, size in models[index + 1 :]]
            break
        free_memory(device, engine)
        longest = max(longest, time.perf_counter() - begin)
    if left_out:
        report.say(f"left out: {', '.join(left_out)}")
    if results:
        report.write(f"\n{table(results)}")
    return {"models": records, "rows": [result.rounded() for result in results], "left_out": left_out}


def _chosen(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(family, size) of the models, those of most interest first."""
    families = (options.families or ("llava_onevision" if options.quick else ",".join(FAMILIES))).split(",")
    sizes = options.size.split(",") if options.size else ["0.5b", "7b"]
    families.sort(key=lambda family: family != "llava_onevision")
    return [(family, size) for family in families for size in sizes if size in sizes_of(family)]


def _plan(options: argparse.Namespace, device: torch.device) -> Plan:
    batches = CPU_BATCHES if device.type == "cpu" else CUDA_BATCHES
    counts = CPU_ROWS if device.type == "cpu" else QUICK_ROWS if options.quick else FULL_ROWS
    here = sys.executable if importlib.util.find_spec("vllm") else None
    systems = options.systems.split(",")
    return Plan(
        workloads=options.workloads.split(","),
        row_counts={name: options.rows or counts[name] for name in WORKLOADS},
        batches=batches,
        generate="generate" in systems,
        vllm_python=(options.vllm_python or here) if "vllm" in systems else None,
        rounds=options.rounds,
        profile=options.profile,
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
