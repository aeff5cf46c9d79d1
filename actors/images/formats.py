"""Image formats that may be decoded (an allow-list), and the names of formats found in a file's first bytes.

Why: Pillow opens some forty formats. Some start a program (Ghostscript for EPS), some are handed to plugins of the
machine (WMF, HDF5), most have not been looked at for years. Images come from strangers, so only formats that Pillow
decodes by itself are named here, and only those of `limits.formats` are tried.
"""

import re

PILLOW = {
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tiff": "TIFF",
    "avif": "AVIF",
    "jpeg2000": "JPEG2000",
    "ppm": "PPM",
}
"""Name in `limits.formats` -> Pillow's."""

DEFAULT_FORMATS = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif")

# What else datasets hold in place of images comes with a name, too: it says what to do.
_SIGNATURES = {
    "jpeg": rb"\xff\xd8\xff",
    "png": rb"\x89PNG\r\n\x1a\n",
    "webp": rb"RIFF....WEBP",
    "gif": rb"GIF8[79]a",
    "bmp": rb"BM",
    "tiff": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
    "avif": rb"....ftypavi[fs]",
    "jpeg2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "ppm": rb"P[1-6fF0y][\s\d]",
    "eps": rb"%!PS|\xc5\xd0\xd3\xc6",
    "pdf": rb"%PDF",
    "wmf": rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF",
    "psd": rb"8BPS",
    "heic": rb"....ftyp(?:hei|hev|mif)",
    "jpeg xl": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "svg": rb"\s*(?:<\?xml[^>]*>\s*)?<svg",
    "html": rb"(?i:\s*<(?:!doctype )?html)",
}
_FOUND = {name: re.compile(signature, re.DOTALL) for name, signature in _SIGNATURES.items()}


def format_of(data: bytes) -> str | None:
    """The format that a file's first bytes are of, where it is a known one.

    >>> format_of(b"%!PS-Adobe-3.0 EPSF-3.0"), format_of(b"hello")
    ('eps', None)
    """
    return next((name for name, signature in _FOUND.items() if signature.match(data)), None)
