"""Generate: a block of prepared rows becomes a block of captions, row by row what stock `generate` says."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest
import torch

from actors.engine.engine import ContinuousEngine
from actors.engine.reference import ReferenceEngine
from actors.errors import RowError
from actors.families import FAMILIES, load_family, load_model
from actors.generate import Generate
from actors.preprocess import Preprocess
from actors.schema import ERROR, IDENTITY, RESULT_SCHEMA, error_value
from tests.blocks import generate_config, picture, preprocess_config, source_block
from tests.checkpoints import untrained


def prepared(path: str, images, **columns) -> pa.Table:
    return Preprocess(preprocess_config(path))(source_block(images, **columns))


@pytest.mark.parametrize("name", FAMILIES)
def test_captions_equal_stock_generate(name):
    path = untrained(name)
    block = prepared(path, [[picture(90, 50)], []], id=["x", "y"], prompt=["Describe the image."] * 2)
    result = Generate(generate_config(path))(block)
    assert result.schema.names == ["id", *IDENTITY, *RESULT_SCHEMA.names]

    family, model = load_family(path), load_model(path)
    for row, source in zip(result.to_pylist(), block.to_pylist(), strict=True):
        ids = torch.tensor([source["_token_ids"]])
        layouts = family.layout(source["_sizes"])
        inputs = {}
        if layouts:
            pixels = torch.frombuffer(bytearray(source["_pixels"]), dtype=torch.uint8)
            inputs = family.model_inputs(pixels.view(-1, *family.tile_shape), layouts)
        stock = model.generate(ids, max_new_tokens=8, do_sample=False, **inputs)[0, ids.shape[1] :].tolist()
        assert row["generated_tokens"] == len(stock)
        assert row["caption"] == family.decode(stock).strip()
        assert row["prompt_tokens"] == ids.shape[1]
        assert row["image_tokens"] == sum(layout.tokens for layout in layouts)
        stopped = stock[-1] in family.eos_token_ids
        assert row["finish_reason"] == ("stop" if stopped else "length")


@pytest.mark.parametrize("engine", ["continuous", "reference"])
def test_captions_of_videos_equal_stock_generate(engine):
    path = untrained("llava_onevision")
    frames = [picture(60, 50, color) for color in ("red", "green", "blue", "white")]
    block = prepared(
        path,
        [[], [picture(90, 50)], []],
        videos=[frames, frames[:2], frames[2:3]],
        id=list("abc"),
        prompt=["Describe the image."] * 3,
    )
    result = Generate(replace(generate_config(path), engine=engine))(block).to_pylist()
    family, model = load_family(path), load_model(path)
    for row, source in zip(result, block.to_pylist(), strict=True):
        ids = torch.tensor([source["_token_ids"]])
        layouts = family.row_layouts([tuple(size) for size in source["_sizes"]])
        pixels = torch.frombuffer(bytearray(source["_pixels"]), dtype=torch.uint8)
        inputs = family.model_inputs(pixels.view(-1, *family.tile_shape), layouts)
        assert "pixel_values_videos" in inputs
        stock = model.generate(ids, max_new_tokens=8, do_sample=False, **inputs)[0, ids.shape[1] :].tolist()
        assert row["caption"] == family.decode(stock).strip()
        assert row["image_tokens"] == sum(layout.tokens for layout in layouts)
    assert len({row["image_tokens"] for row in result}) == 3


def test_failed_rows_pass_through_and_keep_their_place():
    path = untrained("llava_onevision")
    failed = error_value("fetch", "read", "no such file")
    block = prepared(
        path,
        [None, [picture()], [b"no image"]],
        errors=[failed, None, None],
        id=list("abc"),
        prompt=["Describe the image."] * 3,
    )
    rows = Generate(generate_config(path))(block).to_pylist()
    assert [row["id"] for row in rows] == list("abc")
    assert [row["finish_reason"] == "error" for row in rows] == [True, False, True]
    assert rows[0][ERROR] == failed and rows[0]["caption"] is None and rows[0]["generated_tokens"] == 0
    assert rows[2][ERROR]["kind"] == "decode"


def test_a_row_that_fails_in_the_engine_is_an_error_row(monkeypatch):
    path = untrained("llava_onevision")
    block = prepared(path, [[picture()]] * 2, id=["x", "y"], prompt=["Describe the image."] * 2)
    generate = Generate(generate_config(path))
    assert isinstance(generate.engine, ReferenceEngine)
    row_by_row = generate.engine._generate_row

    def second_fails(request):
        if request.key == 1:
            raise RowError("oom", "does not fit")
        return row_by_row(request)

    monkeypatch.setattr(generate.engine, "_generate_row", second_fails)
    rows = generate(block).to_pylist()
    assert rows[0][ERROR] is None
    assert rows[1][ERROR] == error_value("oom", "generate", "does not fit")


def test_a_sampled_row_depends_on_its_identity_not_on_its_batch():
    path = untrained("llava_onevision")
    block = prepared(path, [[picture()]] * 4, id=list("abcd"), prompt=["Describe the image."] * 4)
    generate = Generate(generate_config(path, temperature=3.0, seed=5))
    together = [row["caption"] for row in generate(block).to_pylist()]
    alone = [generate(block.slice(index, 1)).to_pylist()[0]["caption"] for index in range(4)]
    assert together == alone and len(set(together)) > 1


def test_the_engine_computes_on_the_threads_it_was_given(monkeypatch):
    """In the thread that runs its steps: OpenMP counts threads for each thread of a program."""
    path = untrained("llava_onevision")
    before = torch.get_num_threads()
    block = prepared(path, [[picture()]], id=["x"], prompt=["Describe the image."])  # which computes on one
    try:
        actor = Generate(replace(generate_config(path), engine="continuous", threads=before + 1))
        openmp = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))))
        seen = set()
        runner = cast(ContinuousEngine, actor.engine).runner
        step = runner.step

        def counted(chunks):
            sampled = step(chunks)
            seen.add((torch.get_num_threads(), openmp.omp_get_max_threads()))
            return sampled

        monkeypatch.setattr(runner, "step", counted)
        actor(block)
        assert seen == {(before + 1, before + 1)}
    finally:
        torch.set_num_threads(before)
