"""Train a toy checkpoint: `python -m examples.toy.train FAMILY --out DIR --steps N`.

Rows are encoded by the family code that `tessera run` uses (layout, tile, prompt, embed_images), so a
checkpoint that learns is also a test of that code. The loss is on the caption and its end only. Held-out
scenes come from seeds that training never draws; a row counts when its greedy caption is exactly the truth.
Minutes on two cores (set OMP_WAIT_POLICY=PASSIVE where they are shared).
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from actors.families import Family, ImageLayout, load_family, load_model, user_message
from examples.toy.checkpoint import save_weights, write_untrained
from examples.toy.muon import Muon
from examples.toy.scenes import PROMPTS, Scene, caption, draw, random_scene
from examples.toy.vocabulary import LANGUAGES

HELD_OUT = 10_000_000
"""Seeds from here on are never trained on."""
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Row:
    """One scene, encoded."""

    scene: Scene
    language: str
    ids: NDArray[np.int32]
    """[L] prompt and answer ids."""
    answer: int
    """Where in `ids` the answer begins."""
    pixels: Tensor
    """uint8 [T, *tile_shape]"""
    layouts: tuple[ImageLayout, ...]


def encode(family: Family, seed: int) -> Row:
    """The row of a scene's seed; languages take turns."""
    scene = random_scene(seed)
    languages = LANGUAGES[family.name]
    language = languages[seed % len(languages)]
    image = torch.from_numpy(np.asarray(draw(scene)).copy()).permute(2, 0, 1)
    layouts = family.layout([scene.size])
    prompt = family.prompt([user_message(PROMPTS[language], 1)], layouts)
    answer = family.tokenizer(caption(scene, language), add_special_tokens=False)["input_ids"]
    ids = np.asarray([*prompt, *answer, family.tokenizer.eos_token_id], dtype=np.int32)
    return Row(scene, language, ids, len(prompt), family.tile(image, layouts[0]), layouts)


def batches(rows: Sequence[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Endless batches of rows of similar lengths, so that padding is rare."""
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        epoch = []
        for start in range(0, len(order), 16 * size):
            chunk = sorted(order[start : start + 16 * size], key=lambda index: len(rows[index].ids))
            epoch += [chunk[at : at + size] for at in range(0, len(chunk) - size + 1, size)]
        rng.shuffle(epoch)
        for batch in epoch:
            yield [rows[index] for index in batch]


def predict(model: PreTrainedModel, family: Family, rows: Sequence[Row]) -> tuple[Tensor, Tensor, list[int]]:
    """Logits `[A, vocabulary]` at the answers' positions, true ids `[A]`, and each answer's length."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), int(family.tokenizer.pad_token_id))
    targets = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        whole = torch.from_numpy(row.ids).long()
        ids[index, : len(whole)] = whole
        targets[index, row.answer - 1 : len(whole) - 1] = whole[row.answer :]
    layouts = [layout for row in rows for layout in row.layouts]
    features = torch.cat(family.embed_images(model, torch.cat([row.pixels for row in rows]), layouts))
    embeddings = model.get_input_embeddings()(ids)
    # Padding stands on the right, where causal attention keeps it from the answer: no mask is needed.
    embeddings = embeddings.masked_scatter(
        (ids == family.image_token_id)[..., None], features.to(embeddings.dtype)
    )
    hidden = model.model(inputs_embeds=embeddings, use_cache=False)[0]
    answered = targets != IGNORED
    return model.lm_head(hidden[answered]), targets[answered], answered.sum(1).tolist()


@torch.no_grad()
def exact(model: PreTrainedModel, family: Family, rows: Sequence[Row], size: int = 128) -> dict[str, float]:
    """Fraction of rows whose greedy caption is the truth: of "all" and of each aspect and language.

    Greedy decoding gives the truth just where the truth is the most likely id at each of its own positions.
    """
    model.eval()
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        logits, truth, lengths = predict(model, family, batch)
        for row, right in zip(batch, (logits.argmax(-1) == truth).split(lengths), strict=True):
            for key in ("all", row.scene.aspect, row.language):
                hits[key].append(bool(right.all()))
    return {key: sum(values) / len(values) for key, values in sorted(hits.items())}


def optimizers(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices within layers and projector, AdamW for embeddings, norms, biases and the head."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = ".layers." in name or ("multi_modal_projector" in name and not name.endswith("query"))
        (matrices if inside and parameter.ndim >= 2 and "router" not in name else others).append(parameter)
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]


def start_from(model: PreTrainedModel, path: str, prefix: str) -> int:
    """Copy the tensors of another checkpoint that have a name starting with `prefix` and the same shape."""
    own = model.state_dict()
    given = load_model(path).state_dict()
    chosen = {name for name in own if name.startswith(prefix) and name in given}
    chosen = {name for name in chosen if own[name].shape == given[name].shape}
    model.load_state_dict({name: given[name] for name in chosen}, strict=False)
    return len(chosen)


def train(arguments: argparse.Namespace) -> None:
    """Train, keep the best checkpoint by held-out exactness, stop early at the goal, report."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:  # `out` may itself be what to start from
        model = write_untrained(arguments.family, Path(scratch), arguments.seed)
        for source in arguments.init:
            path, _, prefix = source.partition(":")
            print(f"{start_from(model, path, prefix)} tensors from {source}")
        shutil.copytree(scratch, out, dirs_exist_ok=True)
    save_weights(model, out)
    family = load_family(str(out))
    print(f"{family.name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    started = time.monotonic()
    rows = [encode(family, arguments.seed * arguments.rows + index) for index in range(arguments.rows)]
    held_out = [encode(family, HELD_OUT + index) for index in range(arguments.held_out)]
    print(f"{len(rows)} rows in {time.monotonic() - started:.0f} s", flush=True)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the one that is quick to differentiate on a CPU
    chosen = optimizers(model, arguments.lr)
    supply = batches(rows, arguments.batch, random.Random(arguments.seed))
    started, best, recent = time.monotonic(), 0.0, 0.0
    for step in range(1, arguments.steps + 1):
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / arguments.steps)
        rate = min(1.0, step / arguments.warmup) * cosine
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * rate
        model.train()
        logits, truth, _ = predict(model, family, next(supply))
        loss = F.cross_entropy(logits, truth)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        recent += loss.item()
        if step % 50 == 0:
            pace = (time.monotonic() - started) / step
            print(f"{step} loss {recent / 50:.4f} {pace:.3f} s/step", flush=True)
            recent = 0.0
        if step % arguments.every == 0 or step == arguments.steps:
            scores = exact(model, family, held_out)
            print(f"{step} {scores}", flush=True)
            if scores["all"] > best:
                best = scores["all"]
                save_weights(model, out)
            if best >= arguments.goal:
                break
    report(out, time.monotonic() - started)


def report(folder: Path, seconds: float) -> None:
    """Print what the checkpoint in `folder`, as it was rounded and saved, gets right of fresh scenes."""
    family, model = load_family(str(folder)), load_model(str(folder))
    rows = [encode(family, 2 * HELD_OUT + index) for index in range(1000)]
    print(f"{seconds / 60:.1f} minutes; as saved, of {len(rows)}: {exact(model, family, rows)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.toy.train", description=__doc__)
    parser.add_argument("family", choices=sorted(LANGUAGES))
    parser.add_argument("--out", required=True, help="checkpoint folder to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--rows", type=int, default=30_000, help="distinct training scenes")
    parser.add_argument("--held-out", type=int, default=384, help="scenes to measure exactness on")
    parser.add_argument("--every", type=int, default=200, help="steps between measurements")
    parser.add_argument("--goal", type=float, default=0.995, help="held-out exactness to stop at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--init",
        nargs="+",
        default=[],
        metavar="PATH[:PREFIX]",
        help="checkpoints to start from: tensors (with that prefix) of the same name and shape",
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
