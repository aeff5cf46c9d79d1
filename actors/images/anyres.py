"""Which of several resolutions an image of any size is fitted to (the "anyres" rule of LLaVA-NeXT).

Keep as many of the image's own pixels as possible, then waste as little canvas as possible.
Integers and floats only; the order of the float operations is the stock processors', so roundings agree.
"""

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""(height, width) in pixels."""


def best_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The member of `resolutions` that suits an image of `size`; the first among equals."""
    height, width = size

    def merit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), height * width)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def fit(size: Size, canvas: Size) -> Size:
    """The largest size of an image's aspect ratio within `canvas`, rounded up."""
    scale_height, scale_width = canvas[0] / size[0], canvas[1] / size[1]
    if scale_width < scale_height:
        return min(math.ceil(size[0] * scale_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * scale_height), canvas[1])
