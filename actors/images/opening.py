"""Opens images that come from strangers: of allowed formats only, and not those made to be slow.

A decoder in C can be neither interrupted nor timed. So the work is bounded before it begins, by what a file says of
itself and always with the same answer: its format, its pixels and sides (images/decode.py), a JPEG's scans and a PNG's
colour profiles. What is left costs time in proportion to the pixels of the first frame and to the file's bytes
(`limits.max_image_bytes`), at worst a second a MiB. A timer would need a process an image, and on a busy machine it
would refuse what it lets through on an idle one.
"""

import io
import re
from collections.abc import Sequence

from PIL import Image

from actors.errors import RowError
from actors.images.formats import PILLOW, format_of

# A scan of 14 bytes makes the decoder pass over all coefficients: 60 kB of them take 40 s at 4 Mpixel. Progressive
# encoders write 3 to 14; 100 take 1.4 s for 10 Mpixel, and are also what libtiff allows a JPEG within a TIFF.
MAX_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
# What a JPEG or a GIF can have at most. A resize widens all rows before it takes them together, so 2 x 1,250,000 pixels
# (a PNG of 4 kB) on the way to 384 x 384 take 2 GB and 3 s, 300 times what a square of as many takes.
MAX_SIDE = 65_535
MAX_PROFILES = 100  # in a PNG, which may have one; Pillow inflates each, up to 1 MiB
_MARKER = re.compile(rb"\xff([^\x00\xff])")  # stuffed zeros and fill bytes are data


def open_image(data: bytes, formats: Sequence[str]) -> Image.Image:
    """The image of a file of one of `formats` (names of images/formats.py); pixels are not decoded yet.

    Raises RowError "decode" for other formats and what is made to be slow, and what Pillow raises over bad headers.
    """
    found = format_of(data)
    _refuse_slow(data, found)
    try:
        return Image.open(io.BytesIO(data), formats=[PILLOW[name] for name in formats])
    except Image.UnidentifiedImageError as error:
        raise RowError("decode", _unidentified(data, found, formats)) from error


def _refuse_slow(data: bytes, found: str | None) -> None:
    # `count` is fast, and never less than there are.
    if found == "jpeg" and data.count(_START_OF_SCAN) > MAX_SCANS and (scans := _scans(data)) > MAX_SCANS:
        raise RowError(
            "decode", f"the image is a JPEG of {scans:,} scans; more than {MAX_SCANS} are not decoded"
        )
    if found == "png" and (profiles := data.count(b"iCCP")) > MAX_PROFILES:
        raise RowError("decode", f"the image is a PNG of {profiles:,} colour profiles; it may have one")


def _scans(data: bytes) -> int:
    """The scans of a JPEG, as libjpeg reads from marker to marker: without its thumbnails' and what follows its end."""
    scans, place = 0, 2
    while found := _MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if marker == 0xD9:  # end of image
            break
        if 0xD0 <= marker <= 0xD7 or marker == 0x01:  # without a length: restarts within a scan
            continue
        scans += marker == 0xDA
        place += int.from_bytes(data[place : place + 2], "big")
    return scans


def _unidentified(data: bytes, found: str | None, formats: Sequence[str]) -> str:
    if found is None:
        return f"not an image in a known format ({len(data)} bytes)"
    if found in formats:
        return f"cannot decode the image: it begins as {found} and does not go on so ({len(data)} bytes)"
    advice = "add it there, or convert the image" if found in PILLOW else "convert the image"
    return f"the image is {found}, which is not among limits.formats ({', '.join(formats)}): {advice}"
