"""The systems that the engine benchmark compares, each as a function: rows in, seconds and generated tokens out.

All of them get the same token ids and uint8 tiles in memory and give back token ids; what is timed is
everything between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from actors.engine.types import Engine, Request
from actors.families import Family

STATIC_BATCHES = {"decode-heavy": (16, 32), "prefill-heavy": (4, 8)}
"""The sizes of static batches tried, of which the best counts: what was best on every machine so far, and its
neighbour."""

Run = Callable[[Sequence[Request]], int]
"""Rows in, tokens generated out."""


@dataclass(frozen=True)
class Measured:
    """One timed pass over the rows."""

    system: str
    seconds: float
    rows: int
    tokens: int
    """Generated and asked for; what a static batch generates beyond a row's own length does not count."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def timed(system: str, rows: Sequence[Request], run: Run, clock: Callable[[], float]) -> Measured:
    """One pass of `run` (rows -> tokens generated) over the rows."""
    _synchronize()
    begin = clock()
    tokens = run(rows)
    _synchronize()
    return Measured(system, clock() - begin, len(rows), tokens)


def run_engine(engine: Engine) -> Run:
    """Tessera: any engine, all rows at once."""

    def run(rows: Sequence[Request]) -> int:
        completions = list(engine.generate(rows))
        failed = [completion.error for completion in completions if completion.error]
        if failed or len(completions) != len(rows):
            raise RuntimeError(
                f"{len(failed)} rows failed, {len(completions)} of {len(rows)} came: {failed[:1]}"
            )
        return sum(len(completion.token_ids) for completion in completions)

    return run


def run_generate(family: Family, model: PreTrainedModel, batch: int) -> Run:
    """`transformers.generate` in batches of `batch` rows of similar prompt length, left-padded; 1 is the pipeline."""

    @torch.inference_mode()
    def run(rows: Sequence[Request]) -> int:
        ordered = sorted(rows, key=lambda row: len(row.token_ids)) if batch > 1 else list(rows)
        return sum(
            _generate(family, model, ordered[start : start + batch])
            for start in range(0, len(ordered), batch)
        )

    return run


def _generate(family: Family, model: PreTrainedModel, rows: Sequence[Request]) -> int:
    device = model.device
    longest = max(len(row.token_ids) for row in rows)
    pad = [longest - len(row.token_ids) for row in rows]
    ids = torch.stack(
        [F.pad(torch.tensor(row.token_ids).long(), (n, 0)) for row, n in zip(rows, pad, strict=True)]
    )
    mask = torch.stack([F.pad(torch.ones(longest - n, dtype=torch.long), (n, 0)) for n in pad])
    parts = [family.model_inputs(torch.tensor(row.pixels, device=device), row.layouts) for row in rows]
    inputs = {name: _stack([part[name] for part in parts]) for name in parts[0]}
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
    }
    lengths = [row.sampling.max_new_tokens for row in rows]
    config = GenerationConfig(max_new_tokens=max(lengths), do_sample=False, eos_token_id=None, pad_token_id=0)
    output = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, **inputs
    )
    if output.shape[1] != longest + max(lengths):
        raise RuntimeError(f"generate made {output.shape[1] - longest} tokens for {max(lengths)}")
    return sum(lengths)


def _stack(values: Sequence[Tensor]) -> Tensor:
    """Images of several rows after each other; LLaVA-OneVision pads each to the most tiles."""
    if values[0].dim() == 5:
        most = max(value.shape[1] for value in values)
        values = [F.pad(value, (0, 0) * 3 + (0, most - value.shape[1])) for value in values]
    return torch.cat(list(values))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
