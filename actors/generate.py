"""Generate: a GPU actor that turns tiles and token ids into captions.

It holds one replica of the model behind an engine. Rows that already failed pass through; a row that fails here
becomes an error row. A lost device ends the process, so that Ray replaces it: an exception that escaped would end
the job. The rows in flight are tried again (see actors/attempts.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors import numa
from actors.attempts import Attempts, Guard, Unwatched
from actors.engine import Completion, DeviceLost, EngineName, Request, Sampling, build_engine, row_seed
from actors.families import load_family, load_model
from actors.schema import (
    ERROR,
    IDENTITY,
    PIXELS,
    RESULT_SCHEMA,
    ROW,
    SHARD,
    SIZES,
    TOKEN_IDS,
    error_value,
)


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """What a Generate actor is built from. `sampling.seed` is the job's; each row derives its own from it. It computes
    on so many `threads`, of one NUMA node where it can, or with None on as many as torch takes by itself."""

    model_path: str
    revision: str | None
    dtype: str
    engine: EngineName
    sampling: Sampling
    keep: tuple[str, ...]
    threads: int | None = None


_UNWATCHED = Unwatched("generate")


class Generate:
    """Maps a block of `Preprocess` to a block for the ledger (the columns: actors/schema.py)."""

    def __init__(self, config: GenerateConfig, attempts: Attempts = _UNWATCHED) -> None:
        self._attempts, self._guard = attempts, Guard(attempts)  # first: a death while loading counts as one
        if config.threads is not None:
            numa.pin(config.threads, numa.nodes())
            # By itself it would go by OMP_NUM_THREADS, which clusters set to anything
            torch.set_num_threads(config.threads)
        self.config = config
        self.family = load_family(config.model_path, config.revision)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(config.model_path, config.revision, config.dtype, device)
        self.engine = build_engine(config.engine, self.family, model)

    def __call__(self, block: pa.Table) -> pa.Table:
        try:
            return self._guard.run(block, self._generate)
        except (DeviceLost, torch.AcceleratorError) as error:
            self._attempts.end_process(error)

    def _generate(self, block: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = [
            _result(error=error, prompt_tokens=0, image_tokens=0) for error in block[ERROR].to_pylist()
        ]
        requests = {request.key: request for request in self._requests(block)}
        for completion in self.engine.generate(requests.values()):
            index = completion.key
            assert isinstance(index, int)
            ids = requests[index].token_ids
            rows[index] = _result(
                completion,
                prompt_tokens=len(ids),
                image_tokens=len(self.family.placeholders(ids)),
            )
        kept = block.select([*self.config.keep, *IDENTITY])
        results = pa.Table.from_pylist(rows, RESULT_SCHEMA)
        return pa.table([*kept.columns, *results.columns], names=[*kept.column_names, *results.column_names])

    def _requests(self, block: pa.Table) -> Iterator[Request]:
        for index in range(block.num_rows):
            if block[ERROR][index].is_valid:
                continue
            layouts = self.family.row_layouts([tuple(size) for size in block[SIZES][index].as_py()])
            pixels = np.frombuffer(block[PIXELS][index].as_buffer(), np.uint8)
            seed = row_seed(self.config.sampling.seed, block[SHARD][index].as_py(), block[ROW][index].as_py())
            yield Request(
                key=index,
                token_ids=block[TOKEN_IDS][index].values.to_numpy(),
                pixels=pixels.reshape(-1, *self.family.tile_shape),
                layouts=layouts,
                sampling=replace(self.config.sampling, seed=seed),
            )


def _result(
    completion: Completion | None = None,
    *,
    prompt_tokens: int,
    image_tokens: int,
    error: dict[str, str] | None = None,
) -> dict[str, Any]:
    """One row of the result columns: of a completion, or of a row that failed before it got here."""
    if completion is not None and completion.error is not None:
        error = error_value(completion.error.kind, "generate", completion.error.message)
    return {
        "caption": completion.text if completion else None,
        "finish_reason": completion.finish_reason if completion else "error",
        "prompt_tokens": prompt_tokens,
        "image_tokens": image_tokens,
        "generated_tokens": len(completion.token_ids) if completion else 0,
        ERROR: error,
    }
