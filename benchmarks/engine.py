"""Tessera's engine beside what its users have today, on random weights: no downloads, no Ray.

    python -m benchmarks.engine --size mini --device cpu
    python -m benchmarks.engine --size 7b --device cuda --families llava_onevision --systems tessera,generate

Families x {decode-heavy, prefill-heavy} x systems: `tessera` (the continuous engine), `generate` (transformers in
static batches of rows sorted by length, the best of batch 16 and 32, or 4 and 8 where prompts are long), `pipeline`
(transformers row by row, as the model documentation shows; a quarter of the rows, since each costs the same) and
`vllm`, where --vllm-python names an interpreter that has it. A table, then one line of JSON; on stderr, what is being
measured.

What is timed: rows with uint8 tiles and token ids in memory -> generated ids. Each system runs a short warm-up first
and then --rounds passes, round by round so that a busy neighbour troubles all alike; the fastest pass counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import actors  # noqa: F401  (hides a torchvision that does not match torch)
from actors.engine.engine import ContinuousEngine
from actors.engine.types import Request
from actors.families import FAMILIES
from benchmarks.engine_models import build, sizes_of
from benchmarks.engine_roofline import utilisation
from benchmarks.engine_systems import STATIC_BATCHES, Measured, Run, run_engine, run_generate, timed
from benchmarks.engine_vllm import VLLM_FAMILIES, run_vllm
from benchmarks.engine_workloads import WORKLOADS, rows

SYSTEMS = ("tessera", "generate", "pipeline", "vllm")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
ROWS = {"decode-heavy": 32, "prefill-heavy": 8}


@dataclass(frozen=True)
class Case:
    """One family under one workload."""

    family: str
    workload: str
    rows: list[Request]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options().parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    families = [name for name in options.families.split(",") if options.size in sizes_of(name)]
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            for result in _family(family, options, Path(folder) / family):
                results.append(result)
                print(_line(result), flush=True)
    device = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    summary = {
        "benchmark": "engine",
        "size": options.size,
        "device": device,
        "dtype": options.dtype,
        "clock": options.clock,
    }
    print(json.dumps({**summary, "torch": torch.__version__, "rows": results}))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", default="mini", help="toy, mini, 0.5b or 7b (the released checkpoints' shapes)"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, help="float32 on cpu, bfloat16 on cuda unless given")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--systems", default="tessera,generate,pipeline")
    parser.add_argument("--rows", type=int, help=f"rows a workload; else {ROWS}")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, help="CPU threads; else torch's choice")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=list(CLOCKS),
        help="cpu: this process's CPU seconds, which with --threads 1 do not depend on what else the machine does",
    )
    parser.add_argument("--vllm-python", help="an interpreter that has vllm: adds the system vllm")
    return parser


def _family(family: str, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, object]]:
    device = torch.device(options.device)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    dtype: torch.dtype = getattr(torch, options.dtype)
    systems = [name for name in options.systems.split(",") if name in SYSTEMS]
    loaded, stock = build(family, options.size, folder, dtype, device)
    cases = [
        Case(family, workload, rows(loaded, options.size, workload, options.rows or ROWS[workload]))
        for workload in options.workloads.split(",")
    ]
    runs: dict[str, Run] = {}
    if "generate" in systems:
        batches = sorted({batch for case in cases for batch in STATIC_BATCHES[case.workload]})
        runs |= {f"generate {batch}": run_generate(loaded, stock, batch) for batch in batches}
    if "pipeline" in systems:
        runs["pipeline"] = run_generate(loaded, stock, 1)
    engine = None
    if "tessera" in systems:
        # Its own model, of the same weights: the engine re-arranges what it is given.
        engine = ContinuousEngine(*build(family, options.size, folder, dtype, device))
        runs["tessera"] = run_engine(engine)
    for case in cases:
        measured = list(_measure(case, runs, options.rounds, CLOCKS[options.clock]))
        if options.vllm_python and family in VLLM_FAMILIES:
            threads = torch.get_num_threads()
            _tell(case, "vllm")
            measured.append(
                run_vllm(
                    options.vllm_python,
                    folder,
                    case.rows,
                    options.rounds,
                    threads,
                    options.clock,
                    options.dtype,
                )
            )
        use = utilisation(engine, stock, case.rows) if engine else {}
        yield from _results(case, measured, use)


def _measure(case: Case, runs: dict[str, Run], rounds: int, clock: Callable[[], float]) -> Iterator[Measured]:
    """The fastest of `rounds` passes of each system, systems taking turns."""
    best: dict[str, Measured] = {}
    batches = [f"generate {batch}" for batch in STATIC_BATCHES[case.workload]]
    runs = {name: run for name, run in runs.items() if name in (*batches, "pipeline", "tessera")}
    for run in runs.values():
        run(case.rows[:2])
    for _ in range(rounds):
        for name, run in runs.items():
            _tell(case, name)
            rows = case.rows[: -(-len(case.rows) // 4)] if name == "pipeline" else case.rows
            measured = timed(name, rows, run, clock)
            if name not in best or measured.seconds < best[name].seconds:
                best[name] = measured
    yield from best.values()


def _tell(case: Case, system: str) -> None:
    print(f"measuring {case.family} {case.workload} {system}", file=sys.stderr, flush=True)


def _results(case: Case, measured: Sequence[Measured], use: dict[str, float]) -> Iterator[dict[str, object]]:
    static = [each for each in measured if each.system.startswith("generate ")]
    best = max(static, key=lambda each: each.tokens_per_s, default=None)
    others = [each for each in measured if each not in static]
    for each in [*others, *([best] if best else [])]:
        result: dict[str, object] = {
            "family": case.family,
            "workload": case.workload,
            "system": each.system.split()[0],
            "tokens_per_s": round(each.tokens_per_s, 1),
            "rows_per_s": round(each.rows / each.seconds, 3),
            "prompt_tokens": round(sum(len(row.token_ids) for row in case.rows) / len(case.rows)),
            "generated_tokens": round(each.tokens / each.rows, 1),
        }
        if each is best:
            result["batch"] = int(each.system.split()[1])
        elif best is not None:
            result["times_generate"] = round(each.tokens_per_s / best.tokens_per_s, 2)
        if each.system == "tessera":
            result |= use
        yield result


def _line(result: dict[str, object]) -> str:
    known = ("family", "workload", "system", "tokens_per_s", "rows_per_s")
    extra = " ".join(f"{name}={value}" for name, value in result.items() if name not in known)
    family, workload, system, tokens, rows = (result[name] for name in known)
    return f"{family:<16} {workload:<14} {system:<9} {tokens:>9} tok/s {rows:>8} rows/s  {extra}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
