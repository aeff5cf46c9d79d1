"""The toy data is what it says it is, and each checkpoint tells the truth about scenes it has never seen."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from actors.families import load_family, load_model
from examples.toy.checkpoint import save_weights, write_untrained
from examples.toy.dataset import SCHEMA, write_dataset
from examples.toy.muon import orthogonalize
from examples.toy.scenes import ASPECTS, PROMPTS, caption, draw, random_scene
from examples.toy.train import HELD_OUT, encode, exact
from examples.toy.vocabulary import LANGUAGES

EXAMPLES = Path(__file__).parents[2] / "examples"
FAMILIES = sorted(LANGUAGES)
SCENES = 40
FRESH = 3 * HELD_OUT
"""Seeds used neither to train a checkpoint nor to choose it."""


def test_scenes_follow_from_their_seed_and_vary() -> None:
    scenes = [random_scene(seed) for seed in range(300)]
    assert scenes == [random_scene(seed) for seed in range(300)]
    assert {scene.aspect for scene in scenes} == set(ASPECTS)
    assert {scene.relation for scene in scenes} == {None, "left of", "above"}
    assert all(54 <= side <= 100 for scene in scenes for side in scene.size)
    for scene in scenes:
        height, width = scene.size
        assert draw(scene).size == (width, height)
        for thing in scene.things:
            x, y = thing.center
            assert thing.radius <= x <= width - thing.radius and thing.radius <= y <= height - thing.radius


def test_captions_agree_in_every_language() -> None:
    scenes = [random_scene(seed) for seed in range(2000)]
    shown = {(scene.things[0].color, scene.things[0].shape, scene.relation) for scene in scenes}
    assert len(shown) == 6 * 4 * 3
    for language in PROMPTS:  # what differs in English differs everywhere, and the other way round
        assert len({(caption(scene, "en"), caption(scene, language)) for scene in scenes}) == len(
            {caption(scene, "en") for scene in scenes}
        )
    orange = next(scene for scene in scenes if scene.relation is None and scene.things[0].color == "orange")
    assert caption(orange).startswith("an orange ")
    left = [scene for scene in scenes if scene.relation == "left of"]
    cross = next(scene for scene in left if [thing.shape for thing in scene.things] == ["cross", "circle"])
    spanish, french = caption(cross, "es"), caption(cross, "fr")
    assert spanish.startswith("una cruz ") and " a la izquierda de un círculo " in spanish
    assert french.startswith("une croix ") and " à gauche d'un cercle " in french


@pytest.mark.parametrize("corrupt", [0.0, 0.05, 0.13])
def test_dataset_is_deterministic_with_exact_corrupt_rows(tmp_path: Path, corrupt: float) -> None:
    first = write_dataset(tmp_path / "a", rows=90, shards=4, seed=7, corrupt=corrupt)
    second = write_dataset(tmp_path / "b", rows=90, shards=4, seed=7, corrupt=corrupt)
    assert [path.name for path in first] == [f"part-{shard:05d}.parquet" for shard in range(4)]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert {pq.read_metadata(path).num_rows for path in first} == {22, 23}
    table = pa.concat_tables([pq.read_table(path) for path in first])
    assert table.schema.equals(SCHEMA)
    assert table["id"].to_pylist() == [f"{index:06d}" for index in range(90)]
    assert table["truth"].null_count == 0 and set(table["prompt"].to_pylist()) == {PROMPTS["en"]}
    assert sum(not _opens(image) for image in table["image"].to_pylist()) == round(corrupt * 90)


def test_dataset_languages_take_turns_and_seeds_differ(tmp_path: Path) -> None:
    (path,) = write_dataset(tmp_path / "a", rows=30, shards=1, seed=1, languages=("en", "es", "fr"))
    (other,) = write_dataset(tmp_path / "b", rows=30, shards=1, seed=2, languages=("en", "es", "fr"))
    prompts = pq.read_table(path)["prompt"].to_pylist()
    assert Counter(prompts) == dict.fromkeys(PROMPTS.values(), 10)
    assert pq.read_table(path)["truth"] != pq.read_table(other)["truth"]


def test_damage_is_of_every_kind(tmp_path: Path) -> None:
    (path,) = write_dataset(tmp_path, rows=40, shards=1, seed=3, corrupt=0.5)
    images = [image for image in pq.read_table(path)["image"].to_pylist() if not _opens(image)]
    assert len(images) == 20
    assert sum(image is None for image in images) == 5
    assert sum(image is not None and image["bytes"] == b"" for image in images) == 5
    assert sum(image is not None and image["bytes"].startswith(b"\x89PNG") for image in images) == 5


def _opens(image: dict[str, bytes] | None) -> bool:
    if image is None:
        return False
    try:
        Image.open(io.BytesIO(image["bytes"])).load()
    except OSError:
        return False
    return True


def test_orthogonalize_brings_singular_values_near_one() -> None:
    stack = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))
    for matrices in (stack, stack.mT):
        values = torch.linalg.svdvals(orthogonalize(matrices))
        assert values.min() > 0.5 and values.max() < 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_example_job_names_its_checkpoint(family: str) -> None:
    job = yaml.safe_load((EXAMPLES / f"{family}.yaml").read_text())
    assert job["model"]["path"] == f"examples/toy/checkpoints/{family}"
    assert job["input"]["keep"] == ["id", "truth"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_checkpoint_has_the_committed_files(family: str, tmp_path: Path) -> None:
    model = write_untrained(family, tmp_path)
    save_weights(model, tmp_path)
    committed = EXAMPLES / "toy" / "checkpoints" / family
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in committed.iterdir()}
    for name in ("tokenizer.json", "processor_config.json"):
        assert (tmp_path / name).read_text() == (committed / name).read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_tells_the_truth(family: str) -> None:
    """Stock greedy `generate`, row by row, on scenes never seen."""
    folder = EXAMPLES / "toy" / "checkpoints" / family
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * 2**20
    rules, model = load_family(str(folder)), load_model(str(folder))
    assert model.dtype == torch.float32
    right = 0
    for seed in range(FRESH, FRESH + SCENES):
        row = encode(rules, seed)
        prompt = torch.from_numpy(row.ids[: row.answer].astype(np.int64))[None]
        inputs = rules.model_inputs(row.pixels, row.layouts)
        with torch.inference_mode():
            output = model.generate(input_ids=prompt, **inputs, max_new_tokens=32, do_sample=False)
        right += rules.decode(output[0, prompt.shape[1] :].tolist()) == caption(row.scene, row.language)
    assert right / SCENES >= 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_exactness_on_more_scenes(family: str) -> None:
    """One forward pass over many scenes at once agrees: mixed sizes and tile counts in a batch included."""
    folder = str(EXAMPLES / "toy" / "checkpoints" / family)
    rules, model = load_family(folder), load_model(folder)
    scores = exact(model, rules, [encode(rules, seed) for seed in range(FRESH, FRESH + 200)])
    assert scores["all"] >= 0.95
    assert min(scores[aspect] for aspect in ASPECTS) >= 0.9
