"""A whole job beside its engine alone and beside the script one would write otherwise: photographs to captions.

    python -m benchmarks.job --rows 100 --rounds 3
    python -m benchmarks.job --tree ../older-checkout     (another version of Tessera under the same load)

`tessera` is `tessera run` as a command: start-up, model loading, preprocessing, captions, sealing and verifying.
`script` is forty lines of Ray Data around transformers' `generate` (benchmarks/job_script.py), `engine` the continuous
engine fed from memory. All caption the same 640x480 pictures (about 2,000 prompt tokens each) with the same random
weights (LLaVA-OneVision, the size `mini`) and make 32 tokens a row. Each round runs all of them; a table of the
fastest and the slowest round, then one line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import actors  # noqa: F401  (hides a torchvision that does not match torch)
from benchmarks.engine_models import build
from benchmarks.job_processes import watched

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 640, 480
NEW_TOKENS = 32
PROMPT = "Describe the image."
SYSTEMS = ("tessera", "script", "engine")


def main() -> None:
    options = _options()
    seconds: dict[str, list[float]] = {name: [] for name in options.systems.split(",")}
    cpu: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="tessera-job-") as name:
        folder = Path(name)
        write_photographs(folder / "in", options.rows, options.shards)
        write_checkpoint(folder / "checkpoint")
        for _ in range(options.rounds):
            for system in seconds:
                wall, cpu[system] = timed(system, folder, options)
                seconds[system].append(wall)
    print(f"{options.rows} rows, {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for system, times in seconds.items():
        rates = ", ".join(f"{options.rows / each:.3f}" for each in (min(times), max(times)))
        print(f"{system:8}  {min(times):7.1f} - {max(times):7.1f} s   {rates} rows/s")
        print(
            "          CPU s: " + ", ".join(f"{kind} {each:.1f}" for kind, each in cpu[system].most_common())
        )
    print(
        json.dumps(
            {
                "benchmark": "job",
                "commit": _commit(options.tree),
                "rows": options.rows,
                "cores": os.cpu_count(),
                "rounds": options.rounds,
                "torch": torch.__version__,
                "seconds": {system: [round(each, 1) for each in times] for system, times in seconds.items()},
                "cpu_seconds": {system: dict(used.most_common()) for system, used in cpu.items()},
            }
        )
    )


def timed(system: str, folder: Path, options: argparse.Namespace) -> tuple[float, Counter[str]]:
    """Seconds of one run, and CPU seconds by kind of process. Those of the engine alone are without loading and
    preprocessing."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    source, checkpoint = folder / "in", folder / "checkpoint"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    if system == "tessera":
        fields = {
            "input.path": source,
            "model.path": checkpoint,
            "output.path": out,
            "prompt.template": PROMPT,
            "generation.max_new_tokens": NEW_TOKENS,
            "resources.generate.gpus": 0,
        }
        spec = folder / "job.yaml"
        spec.write_text(
            "name: photographs\n" + "".join(f"{key}: {{}}\n" for key in ("input", "model", "output"))
        )
        command = [
            "-m",
            "jobs.cli",
            "run",
            str(spec),
            *(f"--set={key}={value}" for key, value in fields.items()),
        ]
        tree = options.tree
    else:
        module = "benchmarks.job_script" if system == "script" else "benchmarks.job_engine"
        command = ["-m", module, str(source), str(checkpoint), str(out), PROMPT, str(NEW_TOKENS)]
        tree = ROOT
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out_file, tempfile.TemporaryFile("w+") as err_file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=tree,
            env={**environment, "PYTHONPATH": str(tree)},
            stdout=out_file,
            stderr=err_file,
        )
        cpu = watched(process)
        wall = time.perf_counter() - began
        printed, complained = (_text(file) for file in (out_file, err_file))
    if process.returncode:
        raise SystemExit(f"{system} failed:\n{complained[-3000:]}")
    if system == "engine":
        wall, used = (float(each) for each in printed.splitlines()[-1].split())
        cpu = Counter({"generate": used})
    return wall, cpu


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def write_photographs(folder: Path, rows: int, shards: int) -> None:
    """Pictures with the statistics of photographs: energy that falls with frequency, as JPEG of about 60 kB."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(rows):
        layers = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for side in (4, 16, 64, 256):
            noise = random.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
            layers += (
                np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) / side
            )
        layers -= layers.min()
        file = io.BytesIO()
        Image.fromarray((layers / layers.max() * 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    for shard in range(shards):
        mine = pictures[shard::shards]
        table = pa.table({"id": range(shard, rows, shards), "image": mine})
        pq.write_table(table, folder / f"part-{shard:05d}.parquet")


def write_checkpoint(folder: Path) -> None:
    _, model = build("llava_onevision", "mini", folder, torch.float32, torch.device("cpu"))
    model.save_pretrained(folder)


def _commit(tree: Path) -> str:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=tree, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose `tessera run` is timed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
