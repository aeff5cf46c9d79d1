"""vLLM as a system of the engine benchmark, in an interpreter of its own.

VLLM pins its own torch, so it cannot share our process. It gets the same checkpoint folder (random
weights of its own: `load_format="dummy"`), prompts of the same length, noise of the same image sizes and the same
numbers of tokens to generate; it prints one line of JSON. Run as a script, this file is that other side and imports
nothing of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.engine.types import Request
    from benchmarks.engine_systems import Measured

_SITE = """
import contextlib, torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
# The index's torchvision belongs to CUDA builds of torch: on a CPU build its import misses two operators, in every
# process that vLLM starts.

VLLM_FAMILIES = ("llava_onevision", "aria")
"""What its current releases still serve."""


def run_vllm(
    python: str, folder: Path, rows: Sequence[Request], rounds: int, threads: int, clock: str, dtype: str
) -> Measured:
    """The fastest of `rounds` passes of vLLM over like rows. Raises RuntimeError with its last words."""
    from benchmarks.engine_systems import Measured

    image = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    job = {
        "model": str(folder),
        # Aria's stock processor has a size of its own; the checkpoint's must be said again.
        "processor": {name: value for name, value in image.items() if name == "max_image_size"},
        "rounds": rounds,
        "clock": clock,
        "dtype": dtype,
        "rows": [
            {
                "sizes": [layout.size for layout in row.layouts],
                "text_tokens": len(row.token_ids) - sum(layout.tokens for layout in row.layouts),
                "new_tokens": row.sampling.max_new_tokens,
            }
            for row in rows
        ],
    }
    with tempfile.TemporaryDirectory() as site:
        (Path(site) / "sitecustomize.py").write_text(_SITE)
        environment = {**os.environ, "PYTHONPATH": site, "OMP_NUM_THREADS": str(threads)}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that its CPU seconds can be read
        command = [python, __file__]
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, check=False, env=environment
        )
    if done.returncode:
        raise RuntimeError(f"vllm failed:\n{done.stderr[-3000:]}")
    answer = next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"seconds"'))
    seconds = json.loads(answer)["seconds"]
    return Measured("vllm", seconds, len(rows), sum(row.sampling.max_new_tokens for row in rows))


def _serve(job: dict[str, Any]) -> float:
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    random = np.random.default_rng(0)
    longest = max(row["text_tokens"] for row in job["rows"])
    model = LLM(
        model=job["model"],
        load_format="dummy",
        dtype=job["dtype"],  # "auto" would make 16 bits of 32
        max_model_len=4096,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        mm_processor_kwargs=job["processor"],
        limit_mm_per_prompt={"image": max(len(row["sizes"]) for row in job["rows"])},
        seed=0,
    )
    tokenizer = model.get_tokenizer()
    template = [{"role": "user", "content": [{"type": "text", "text": "describe"}]}]
    overhead = len(tokenizer.apply_chat_template(template, add_generation_prompt=True))
    prompts = []
    for row in job["rows"]:
        noise = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in row["sizes"]]
        images = [Image.fromarray(each) for each in noise]
        words = " ".join(["red"] * max(1, min(longest, row["text_tokens"] - overhead)))
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": words}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        prompts.append({"prompt": text, "multi_modal_data": {"image": images}})
    rules = [
        SamplingParams(temperature=0, max_tokens=row["new_tokens"], ignore_eos=True, detokenize=False)
        for row in job["rows"]
    ]
    model.generate(prompts[:2], rules[:2], use_tqdm=False)
    best = float("inf")
    clock = time.process_time if job["clock"] == "cpu" else time.perf_counter
    for _ in range(job["rounds"]):
        begin = clock()
        outputs = model.generate(prompts, rules, use_tqdm=False)
        best = min(best, clock() - begin)
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        if made != sum(row["new_tokens"] for row in job["rows"]):
            raise RuntimeError(f"vllm made {made} tokens")
    return best


if __name__ == "__main__":
    print(json.dumps({"seconds": _serve(json.loads(sys.stdin.read()))}))
