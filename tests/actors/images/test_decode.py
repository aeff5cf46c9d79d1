"""Decoding equals what the stock processors make of a PIL image, and every bad image is a RowError."""

import contextlib
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from actors.errors import RowError
from actors.images.decode import decode
from actors.images.opening import MAX_SIDE

LIMIT = 178_956_970


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def stock(data: bytes) -> Tensor:
    """uint8 [3, H, W] of the stock torchvision-backend processor given `Image.open(data)`."""
    pytest.importorskip("torchvision")
    from transformers import LlavaOnevisionImageProcessor

    return LlavaOnevisionImageProcessor().process_image(Image.open(io.BytesIO(data)), do_convert_rgb=True)


def random_image(mode: str, size: tuple[int, int] = (13, 7)) -> Image.Image:
    """A random image of a Pillow mode; transparent modes get every alpha from 0 to 255."""
    rng = np.random.default_rng(0)
    width, height = size
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (height, width), np.uint8) * 255).convert("1")
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), np.uint16))
    if mode == "P":
        image = Image.fromarray(rng.integers(0, 256, (height, width), np.uint8), "P")
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        return image
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width) if bands == 1 else (height, width, bands)
    return Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGB", "PNG"),
        ("RGB", "JPEG"),
        ("RGB", "WEBP"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("I;16", "PNG"),
        ("I;16", "TIFF"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
    ],
)
def test_modes_equal_stock(mode: str, file_format: str) -> None:
    data = encoded(random_image(mode), file_format)
    pixels = decode(data, LIMIT)
    assert pixels.dtype == torch.uint8 and tuple(pixels.shape) == (3, 7, 13) and pixels.is_contiguous()
    assert torch.equal(pixels, stock(data))


@pytest.mark.parametrize("transparency", [0, bytes(range(256))])
def test_palette_transparency_is_white(transparency: int | bytes) -> None:
    data = encoded(Image.new("P", (2, 2), 0), "PNG", transparency=transparency)
    assert torch.equal(decode(data, LIMIT), stock(data))
    assert decode(data, LIMIT).unique().tolist() == [255]


def test_transparency_is_blended_with_white() -> None:
    data = encoded(Image.new("RGBA", (1, 1), (0, 100, 200, 128)), "PNG")
    assert decode(data, LIMIT).flatten().tolist() == [127, 177, 227]


def test_sixteen_bits_convert_as_stock_does() -> None:
    """Whatever Pillow does to 16-bit grey: what the model was given in training is what it gets."""
    values = np.array([[0, 7, 255, 256, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    assert torch.equal(decode(data, LIMIT), stock(data))


def test_exif_orientation_is_left() -> None:
    image = random_image("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    data = encoded(image, "PNG", exif=exif)
    assert torch.equal(decode(data, LIMIT), decode(encoded(image, "PNG"), LIMIT))
    assert torch.equal(decode(data, LIMIT), stock(data))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data, LIMIT)[:, 0, 0].tolist() == pytest.approx([255, 0, 0], abs=2)


def test_empty_is_an_error() -> None:
    with pytest.raises(RowError, match="0 bytes") as error:
        decode(b"", LIMIT)
    assert error.value.kind == "decode"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated_is_an_error(file_format: str, kept: float) -> None:
    data = encoded(random_image("RGB", (200, 100)), file_format)
    with pytest.raises(RowError) as error:
        decode(data[: int(len(data) * kept)], LIMIT)
    assert error.value.kind == "decode"


@pytest.mark.parametrize("data", [b"x", b"not an image at all", b"\x89PNG\r\n\x1a\n", b"BM<", bytes(999)])
def test_other_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(RowError, match="not an image|cannot decode") as error:
        decode(data, LIMIT)
    assert error.value.kind == "decode"


def test_flipped_bytes_never_escape() -> None:
    """Whatever a corrupt file makes a decoder do, it comes out as pixels or as a RowError."""
    rng = np.random.default_rng(1)
    for file_format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        data = encoded(random_image("RGB", (40, 30)), file_format)
        for _ in range(60):
            corrupt = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                corrupt[place] = rng.integers(0, 256)
            with contextlib.suppress(RowError):
                assert decode(bytes(corrupt), 10_000).dtype == torch.uint8


def test_too_large_is_seen_in_the_header() -> None:
    data = encoded(Image.new("L", (30, 20)), "PNG")
    assert decode(data, 600).shape == (3, 20, 30)
    with pytest.raises(RowError, match=r"30 x 20 = 600 pixels, above max_pixels=599") as error:
        decode(data, 599)
    assert error.value.kind == "too_large"
    # A header that promises 4 Gpixel without such data behind it is refused for its size, not its data.
    size = b"IHDR" + struct.pack(">II", 65_000, 65_000) + data[24:29]
    promise = data[:12] + size + struct.pack(">I", zlib.crc32(size)) + data[33:]
    with pytest.raises(RowError, match="max_pixels") as error:
        decode(promise, LIMIT)
    assert error.value.kind == "too_large"


@pytest.mark.filterwarnings("error")
def test_the_limit_may_exceed_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(Image.new("L", (30, 20)), "PNG")
    with pytest.raises(RowError) as error:
        decode(data, 50)
    assert error.value.kind == "too_large"
    assert decode(data, 1000).shape == (3, 20, 30)


def test_errors_pickle() -> None:
    error = pickle.loads(pickle.dumps(RowError("too_large", "message")))
    assert (error.kind, error.message, str(error)) == ("too_large", "message", "message")


@pytest.mark.parametrize("size", [(1, MAX_SIDE + 1), (MAX_SIDE + 1, 2)])
def test_a_picture_like_a_thread_is_too_large(size: tuple[int, int]) -> None:
    """A few kilobytes of it would take gigabytes to resize."""
    with pytest.raises(RowError, match="no side may have more than 65,535") as caught:
        decode(encoded(Image.new("L", size), "PNG"), LIMIT)
    assert caught.value.kind == "too_large"
    assert decode(encoded(Image.new("L", (MAX_SIDE, 1)), "PNG"), LIMIT).shape == (3, 1, MAX_SIDE)
