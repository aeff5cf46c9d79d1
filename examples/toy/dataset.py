"""Write toy scenes: `python -m examples.toy.dataset OUT --rows N --shards K --seed S [--corrupt R]`.

Columns of the parquet shards: `id` string, `image` struct {bytes, path} as Hugging Face datasets store it,
`prompt`, and `truth`, the one true caption in the prompt's language. The same arguments give the same bytes.
Corrupt rows (exactly round(R * N), spread by the seed) have a truncated, garbage, empty or null image and
keep their truth.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from examples.toy.scenes import PROMPTS, caption, draw, random_scene

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "prompt": pa.string(),
        "truth": pa.string(),
    }
)
ROW_GROUP_ROWS = 16
DAMAGES = ("truncated", "garbage", "empty", "null")
FIRST_SEED = 50_000_000
"""Scenes come from seeds that examples.toy.train never draws, for training or for measuring."""
_SEEDS_A_DATASET = 1_000_000


def write_dataset(
    out: Path, rows: int, shards: int, seed: int, corrupt: float = 0.0, languages: Sequence[str] = ("en",)
) -> list[Path]:
    """Write `rows` rows evenly over `shards` files `part-00000.parquet`, ... in `out`."""
    if rows < 1 or shards < 1:
        raise ValueError(f"rows and shards must be at least 1, got {rows} and {shards}")
    if not 0.0 <= corrupt <= 1.0:
        raise ValueError(f"corrupt is a fraction from 0 to 1, got {corrupt}")
    damages = choose_damages(rows, seed, corrupt)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        begin, end = rows * shard // shards, rows * (shard + 1) // shards
        records = [make_row(index, seed, damages.get(index), languages) for index in range(begin, end)]
        path = out / f"part-{shard:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), path, row_group_size=ROW_GROUP_ROWS)
        paths.append(path)
    return paths


def choose_damages(rows: int, seed: int, corrupt: float) -> dict[int, str]:
    """Which rows are corrupt, and how: {index: one of DAMAGES}, exactly round(corrupt * rows) of them."""
    chosen = random.Random(f"corrupt {seed}").sample(range(rows), round(corrupt * rows))
    return {index: DAMAGES[place % len(DAMAGES)] for place, index in enumerate(chosen)}


def make_row(index: int, seed: int, damage: str | None, languages: Sequence[str]) -> dict[str, object]:
    """One record of SCHEMA; languages take turns."""
    scene = random_scene(FIRST_SEED + seed * _SEEDS_A_DATASET + index)
    language = languages[index % len(languages)]
    name = f"{index:06d}"
    buffer = io.BytesIO()
    draw(scene).save(buffer, format="PNG")
    data = buffer.getvalue()
    image = {"bytes": spoil(data, damage, index) if damage else data, "path": f"{name}.png"}
    return {
        "id": name,
        "image": None if damage == "null" else image,
        "prompt": PROMPTS[language],
        "truth": caption(scene, language),
    }


def spoil(data: bytes, damage: str, seed: int) -> bytes:
    """An image's bytes after some damage of DAMAGES; a null image is the caller's to make."""
    if damage == "truncated":
        return data[: len(data) // 2]
    if damage == "garbage":
        return random.Random(f"garbage {seed}").randbytes(len(data))
    return b""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.toy.dataset", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the shards into")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--corrupt", type=float, default=0.0, help="fraction of rows with a broken image")
    parser.add_argument("--languages", nargs="+", choices=sorted(PROMPTS), default=["en"])
    given = parser.parse_args()
    try:
        paths = write_dataset(given.out, given.rows, given.shards, given.seed, given.corrupt, given.languages)
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.rows} rows in {len(paths)} shards under {given.out}")


if __name__ == "__main__":
    main()
