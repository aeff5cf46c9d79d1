"""Encoded pictures of any size, aspect ratio and Pillow mode."""

import io
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.actors.families.sizes import sizes

MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1")


@dataclass(frozen=True)
class Picture:
    """A picture of noise; its `repr` is all one needs to make it again."""

    size: tuple[int, int]
    mode: str = "RGB"
    seed: int = 0

    @property
    def data(self) -> bytes:
        """An uncompressed TIFF: it knows all modes, and noise would take deflate seconds."""
        buffer = io.BytesIO()
        self._image().save(buffer, "TIFF")
        return buffer.getvalue()

    def open(self) -> Image.Image:
        """As a user of the stock processors would open it."""
        return Image.open(io.BytesIO(self.data))

    def _image(self) -> Image.Image:
        height, width = self.size
        noise = np.random.default_rng(self.seed)
        if self.mode == "I;16":
            return Image.fromarray(noise.integers(0, 1 << 16, (height, width), dtype=np.uint16))
        if self.mode == "1":
            return Image.fromarray(noise.integers(0, 2, (height, width), dtype=np.uint8) * 255).convert("1")
        bands = len(Image.new(self.mode, (1, 1)).getbands())
        pixels = noise.integers(0, 256, (height, width, bands), dtype=np.uint8)
        image = Image.frombytes(self.mode, (width, height), pixels.tobytes())
        if self.mode == "P":
            image.putpalette(noise.integers(0, 256, 768, dtype=np.uint8).tobytes())
        return image


def pictures() -> st.SearchStrategy[Picture]:
    return st.builds(Picture, sizes(), st.sampled_from(MODES), st.integers(0, 9))
