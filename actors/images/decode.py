"""Encoded image bytes -> uint8 RGB pixels.

Do exactly what the stock processors do with a PIL image (transparency composited on white,
then "RGB"; EXIF orientation not applied), and turn everything that can go wrong into one `RowError`
whose kind is the row's error kind. What makes a file too dangerous to decode stands in images/opening.py.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from actors.errors import RowError
from actors.images.formats import DEFAULT_FORMATS
from actors.images.opening import MAX_SIDE, open_image


def decode(data: bytes, max_pixels: int, formats: Sequence[str] = DEFAULT_FORMATS) -> Tensor:
    """Decode the first frame of `data` to uint8 `[3, H, W]`.

    The size is checked in the header, before any pixel is decoded. Raises RowError: "too_large" above `max_pixels`
    or with a side above `MAX_SIDE`, "decode" for a format that is not among `formats` (names of images/formats.py) and
    for anything that is empty, truncated, corrupt, not an image, or made to be slow (images/opening.py).

    >>> import io; buffer = io.BytesIO(); Image.new("L", (5, 2), 7).save(buffer, "PNG")
    >>> tuple(decode(buffer.getvalue(), 100).shape)
    (3, 2, 5)
    """
    if not data:
        raise RowError("decode", "the image is empty (0 bytes)")
    _raise_pillow_limit(max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities in metadata; what matters is raised
            pixels = _pixels(data, max_pixels, formats)
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError("too_large", f"the image exceeds max_pixels={max_pixels}: {error}") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... on bad data
        raise RowError("decode", f"cannot decode the image: {type(error).__name__}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB as the stock processors do: what is transparent becomes white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _pixels(data: bytes, max_pixels: int, formats: Sequence[str]) -> NDArray[np.uint8]:
    with open_image(data, formats) as image:
        width, height = image.size
        if width * height > max_pixels:
            size = f"{width} x {height} = {width * height} pixels"
            raise RowError("too_large", f"the image is {size}, above max_pixels={max_pixels}")
        if max(width, height) > MAX_SIDE:
            message = f"the image is {width} x {height} pixels, and no side may have more than {MAX_SIDE:,}"
            raise RowError("too_large", message)
        return np.array(to_rgb(image))


def _raise_pillow_limit(max_pixels: int) -> None:
    """Let Pillow's own guard (it refuses twice its limit) stand behind ours instead of before it."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
