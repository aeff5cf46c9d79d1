"""A fast path that lies changes no caption, and the run says what it did."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from actors.attempts import Unwatched
from actors.engine.devices.cpu import kernels
from actors.generate import Generate
from actors.preprocess import Preprocess
from pipeline.ledger.ledger import JOURNAL, Ledger
from pipeline.run.engines import Engines
from pipeline.run.stages import PublishingGenerate, reports_in
from pipeline.storage.lease import Fence
from tests.blocks import generate_config, picture, preprocess_config, source_block
from tests.checkpoints import untrained


def test_a_kernel_that_lies_changes_no_caption_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = untrained("llava_onevision")
    block = Preprocess(preprocess_config(path))(
        source_block([[picture(90, 50)], []], id=["x", "y"], prompt=["Describe the image."] * 2)
    )
    exact = Generate(generate_config(path))(block)["caption"].to_pylist()
    for name in ("decode", "attend"):
        right = getattr(kernels.AttentionKernel, name)
        monkeypatch.setattr(
            kernels.AttentionKernel, name, lambda *a, right=right, **b: right(*a, **b).add_(0.3)
        )
    config = replace(generate_config(path), engine="continuous")
    monkeypatch.setattr(Fence, "stopping", lambda _: False)
    monkeypatch.setattr(Fence, "check", lambda _: None)
    ledger = Ledger(str(tmp_path))
    fence = Fence(ledger.storage, "run")
    stage = PublishingGenerate(fence, config, Unwatched("generate"), ledger, JOURNAL)
    (report,) = reports_in(stage(block))
    (part,) = report.parts
    assert pq.read_table(tmp_path / part.path)["caption"].to_pylist() == exact
    assert report.engine is not None and report.engine.attention != "compiled"
    assert any(
        line.startswith("attention: sdpa, because compiled: differed by ")
        for line in Engines().add([report.engine])
    )
