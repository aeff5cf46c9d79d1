"""A job to be disturbed: its input, its command line, what an undisturbed run captions, and the audit of an output."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from examples.toy.dataset import SCHEMA, write_dataset
from pipeline.storage.storage import Storage
from tests.chaos import faults
from tests.commands import settings

SPEC = "examples/llava_onevision.yaml"
_COMPARED = ("caption", "finish_reason", "prompt_tokens", "image_tokens", "generated_tokens", "error")

Rows = Mapping[str, tuple[Any, ...]]
"""What each row became, by the row's id."""


@dataclass(frozen=True)
class Scene:
    """A job on `rows` toy pictures; `root` is the folder or bucket that input and output lie in."""

    root: str
    checkpoint: str
    max_new_tokens: int = 2
    replicas: int = 1

    @property
    def output(self) -> str:
        return f"{self.root}/out"

    def run(self, output: str | None = None) -> list[str]:
        """The arguments of `tessera` that run it."""
        return ["run", *self.arguments(output)]

    def arguments(self, output: str | None = None) -> list[str]:
        """The spec and its settings, for any command."""
        pool = f"[{self.replicas}, {self.replicas}]"
        fields = {
            "input__path": f"{self.root}/in",
            "output__path": output or self.output,
            "model__path": self.checkpoint,
            "generation__max_new_tokens": self.max_new_tokens,
            "resources__preprocess__replicas": pool,
            "resources__generate__replicas": pool,
        }
        return [SPEC, *settings(**fields)]

    def captions(self, output: str | None = None) -> tuple[Rows, Counter[str]]:
        """(what each row of the sealed output became, how often each id stands there)."""
        storage = Storage(output or self.output)
        found: dict[str, tuple[Any, ...]] = {}
        times: Counter[str] = Counter()
        for info in storage.list("data"):
            for row in pq.read_table(io.BytesIO(storage.read(info.path))).to_pylist():
                found[row["id"]] = tuple(repr(row[name]) for name in _COMPARED)
                times[row["id"]] += 1
        return found, times


@dataclass(frozen=True)
class Audit:
    """An output against an undisturbed run's: counts of rows, and the first that differ, as (id, expected, found)."""

    lost: int
    duplicated: int
    differing: int
    examples: tuple[tuple[str, object, object], ...] = ()

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.differing)


def audit(scene: Scene, expected: Rows, output: str | None = None) -> Audit:
    """Compares row by row, by the rows' own ids."""
    found, times = scene.captions(output)
    differing = [name for name in sorted(expected.keys() & found.keys()) if found[name] != expected[name]]
    return Audit(
        lost=len(expected.keys() - found.keys()),
        duplicated=sum(count - 1 for count in times.values()) + len(found.keys() - expected.keys()),
        differing=len(differing),
        examples=tuple((name, expected[name], found[name]) for name in differing[:5]),
    )


def write_input(folder: Path, rows: int, shards: int, seed: int) -> None:
    """Toy pictures, one in twenty of them broken: an error row must survive chaos like any other."""
    write_dataset(folder, rows=rows, shards=shards, seed=seed, corrupt=0.05)


def write_poisoned(
    folder: Path, rows: int, poison: Mapping[int, bytes], picture: Callable[[int], bytes]
) -> None:
    """One shard of `rows` pictures in which `poison` gives the bytes of some."""
    records = [
        {
            "id": str(row),
            "image": {"bytes": poison.get(row) or picture(row), "path": None},
            "prompt": "Describe the image.",
            "truth": "",
        }
        for row in range(rows)
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(records, SCHEMA), folder / "part-00000.parquet")


def poisons(
    places: Mapping[int, tuple[str, faults.Manner]], picture: Callable[..., bytes]
) -> dict[int, bytes]:
    """Images that kill at `places`: {row: (stage, manner)}."""
    return {
        row: faults.poison_image(manner) if stage == "preprocess" else picture(*faults.poison_size(manner))
        for row, (stage, manner) in places.items()
    }
