"""What is not decoded: formats that are not allowed, by name, and files that are made to be slow."""

import io
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image

from actors.errors import RowError
from actors.images.decode import decode
from actors.images.formats import DEFAULT_FORMATS, PILLOW, format_of
from actors.images.opening import MAX_SCANS
from tests.blocks import scan_bomb

LIMIT = 178_956_970


def encoded(file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), "teal").save(buffer, file_format, **options)
    return buffer.getvalue()


def refusal(data: bytes, formats: tuple[str, ...] = DEFAULT_FORMATS) -> str:
    with pytest.raises(RowError) as error:
        decode(data, LIMIT, formats)
    assert error.value.kind == "decode"
    return error.value.message


@pytest.mark.parametrize("name", PILLOW)
def test_each_format_is_decoded_only_where_it_is_named(name: str) -> None:
    data = encoded(PILLOW[name])
    assert format_of(data) == name
    assert decode(data, LIMIT, (name,)).shape == (3, 12, 16)
    others = tuple(other for other in PILLOW if other != name)
    listed = f"the image is {name}, which is not among limits.formats ({', '.join(others)}): add it there"
    assert refusal(data, others).startswith(listed)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("eps", encoded("EPS")),
        ("pdf", encoded("PDF")),
        ("psd", b"8BPS\0\1" + bytes(40)),
        ("wmf", b"\xd7\xcd\xc6\x9a" + bytes(40)),
        ("wmf", b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(40)),
        ("heic", b"\0\0\0\x18ftypheic" + bytes(40)),
        ("svg", b'<?xml version="1.0"?>\n<svg></svg>'),
        ("html", b"<!DOCTYPE html><title>404 Not Found</title>"),
    ],
)
def test_what_may_start_programs_or_is_no_picture_is_told_by_name(
    name: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", None)  # how Pillow starts Ghostscript
    message = refusal(data, tuple(PILLOW))
    assert message.startswith(f"the image is {name}, which is not among") and "convert the image" in message


def test_a_scan_bomb_is_refused_before_it_is_decoded() -> None:
    data = scan_bomb(scans=40_000)  # half a megabyte; decoding it would take minutes
    assert f"a JPEG of 40,000 scans; more than {MAX_SCANS} are" in refusal(data)
    # The same as the second picture of a file, behind an end of image, costs nothing: it is not decoded.
    assert decode(encoded("JPEG") + data, LIMIT).shape == (3, 12, 16)


def test_progressive_pictures_and_their_thumbnails_are_decoded() -> None:
    progressive = encoded("JPEG", progressive=True)
    exif = Image.Exif()
    exif[0x927C] = b"\xff\xda" * 1000  # a maker note full of what look like scans
    assert decode(progressive, LIMIT).shape == (3, 12, 16)
    assert decode(encoded("JPEG", exif=exif), LIMIT).shape == (3, 12, 16)
    assert decode(scan_bomb(scans=MAX_SCANS), LIMIT).shape[0] == 3


def test_compressed_metadata_is_not_inflated_without_end() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png, bomb = encoded("PNG"), b"k\0\0" + zlib.compress(bytes(1_000_000))
    profiles = png[:33] + chunk(b"iCCP", bomb) * 101 + png[33:]
    assert "a PNG of 101 colour profiles; it may have one" in refusal(profiles)
    assert "text chunks" in refusal(png[:33] + chunk(b"zTXt", bomb) * 101 + png[33:])
    assert decode(png[:33] + chunk(b"iCCP", bomb) + png[33:], LIMIT).shape == (3, 12, 16)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_only_the_first_frame_is_decoded(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (16, 12), (index, 0, 0)) for index in range(20)]
    data = encoded(file_format, save_all=True, append_images=frames)
    kind, sought = type(Image.open(io.BytesIO(data))), set()
    seek = kind.seek

    def spy(image: Image.Image, number: int) -> None:
        sought.add(number)
        seek(image, number)

    monkeypatch.setattr(kind, "seek", spy)
    assert decode(data, LIMIT).shape == (3, 12, 16)
    assert sought <= {0}


def shared_tags(count: int, size: int) -> bytes:
    """A TIFF of 4 x 4 pixels with `count` tags more, all of which are the same `size` bytes of the file."""
    plain = [
        (256, 4, 4),
        (257, 4, 4),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (277, 3, 1),
        (278, 4, 4),
        (279, 4, 16),
    ]
    data = 8 + 2 + 12 * (len(plain) + 1 + count) + 4
    tags = [struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in [*plain, (273, 4, data)]]
    tags += [struct.pack("<HHLL", 1000 + number, 7, size, data) for number in range(count)]
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + b"".join(tags) + bytes(4 + size)


def with_exif(exif: bytes) -> bytes:
    """A JPEG without a resolution of its own, which Pillow then looks for in EXIF, in as many segments as it takes."""
    jpeg = encoded("JPEG")
    rest = jpeg[4 + int.from_bytes(jpeg[4:6], "big") :]
    parts = (b"Exif\0\0" + exif[start : start + 65_000] for start in range(0, len(exif), 65_000))
    segments = (b"\xff\xe1" + struct.pack(">H", 2 + len(part)) + part for part in parts)
    return jpeg[:2] + b"".join(segments) + rest


@pytest.mark.parametrize(
    "data", [shared_tags(500, 1 << 20), with_exif(shared_tags(500, 1 << 20))], ids=["tiff", "exif"]
)
def test_tags_that_share_bytes_take_no_more_memory_than_the_file(data: bytes) -> None:
    """Pillow 12 copied them a tag, which made gigabytes of a file of 1 MiB."""
    tracemalloc.start()
    try:
        decode(data, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
