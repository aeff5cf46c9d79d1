"""The rows that every system of the engine benchmark generates for.

A row is a prompt, noise for pixels and a number of tokens to generate, drawn once; each system runs the
same rows, so rates compare directly. `decode-heavy` has few visual tokens and log-normal captions (mean 60, at most
128), `prefill-heavy` thousands of visual tokens and about 30 tokens of text.
"""

from __future__ import annotations

import numpy as np

from actors.engine.types import Request, Sampling
from actors.families import Family, user_message
from benchmarks.engine_models import tile_side

WORKLOADS = ("decode-heavy", "prefill-heavy")

Sizes = tuple[tuple[int, int], ...]


def images_of(family: str, size: str, workload: str) -> Sizes:
    """(height, width) of a row's images: as few tokens as the family allows above ~300, or two to three thousand."""
    decode = workload == "decode-heavy"
    if family == "fuyu":
        return ((480, 540),) if decode else ((1080, 1920),)
    side = tile_side(family, size)
    small = size in ("toy", "mini")
    # Decode: a whole view, and one tile of which a quarter is left once unpadded
    if family == "llava_onevision":
        return ((side // 4, side),) if decode else ((3 * side, (3 if small else 2) * side),)
    if family == "aya_vision":
        return (
            ((2 * side, (2 if small else 1) * side),)
            if decode
            else ((3 * side, 4 * side),) * (3 if small else 1)
        )
    return ((side, side),) if decode else ((side, side),) * 8


def rows(family: Family, size: str, workload: str, count: int) -> list[Request]:
    """`count` requests, the same each time."""
    random = np.random.default_rng(0)
    sizes = images_of(family.name, size, workload)
    layouts = family.layout(sizes)
    tiles = sum(layout.tiles for layout in layouts)
    words = ["describe", "the", "image", "circle", "square", "left", "of", "red", "blue", "background"]
    requests = []
    for key in range(count):
        text = " ".join(random.choice(words, size=int(random.integers(8, 40))))
        if workload == "decode-heavy":
            length = random.lognormal(np.log(60) - 0.5 * 0.6**2, 0.6)
        else:
            length = random.normal(30, 5)
        requests.append(
            Request(
                key=key,
                token_ids=family.prompt([user_message(text, images=len(sizes))], layouts),
                pixels=random.integers(0, 256, (tiles, *family.tile_shape), dtype=np.uint8),
                layouts=layouts,
                sampling=Sampling(max_new_tokens=int(np.clip(length, 4, 128))),
            )
        )
    return requests
