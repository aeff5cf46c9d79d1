"""The stages as a drain wants them: once the run stops, they finish the block in hand and let the others fall.

An empty block costs nothing, so the pipeline runs dry by itself, and what was being generated is published.
"""

from __future__ import annotations

import pyarrow as pa

from actors import generate, preprocess
from actors.attempts import Attempts
from pipeline.lease import Fence


class Preprocess(preprocess.Preprocess):
    def __init__(self, fence: Fence, config: preprocess.PreprocessConfig, attempts: Attempts) -> None:
        super().__init__(config, attempts)
        self._fence = fence

    def __call__(self, block: pa.Table) -> pa.Table:
        return super().__call__(block.slice(0, 0) if self._fence.stopping() else block)


class Generate(generate.Generate):
    def __init__(self, fence: Fence, config: generate.GenerateConfig, attempts: Attempts) -> None:
        super().__init__(config, attempts)
        self._fence = fence

    def __call__(self, block: pa.Table) -> pa.Table:
        return super().__call__(block.slice(0, 0) if self._fence.stopping() else block)
