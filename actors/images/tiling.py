"""Resize, pad and cut uint8 images with core torch.

Torchvision's resize of a uint8 tensor on the CPU *is* `F.interpolate(antialias=True)` on
uint8, so calling that directly gives the stock processors' pixels bit for bit without needing torchvision.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

# PIL.Image.Resampling codes, as they stand in processor configs.
NEAREST, LANCZOS, BILINEAR, BICUBIC = 0, 1, 2, 3
_MODES = {NEAREST: "nearest-exact", LANCZOS: "lanczos", BILINEAR: "bilinear", BICUBIC: "bicubic"}


def resize(image: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """Resize uint8 `[3, H, W]` (or `[N, 3, H, W]`) to `size` = (height, width), antialiased, on the CPU.

    `resample` is a PIL code (0 nearest, 1 lanczos, 2 bilinear, 3 bicubic). An image that already has the
    size is returned as it is.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if resample not in _MODES:
        raise ValueError(f"resample={resample} is not supported; use one of {sorted(_MODES)} (PIL codes)")
    # Core torch fails an internal assertion on the way from a contiguous image to a single pixel.
    memory_format = torch.channels_last if tuple(size) == (1, 1) else torch.contiguous_format
    batch = (image if image.dim() == 4 else image[None]).contiguous(memory_format=memory_format)
    if resample == NEAREST:
        out = F.interpolate(batch, size=size, mode=_MODES[resample])
    elif resample == BILINEAR and not _bilinear_is_native():
        # torchvision goes through float32 on CPUs without AVX2; following it keeps the bits equal there too.
        wide = F.interpolate(batch.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        out = wide.round_().to(torch.uint8)
    else:
        out = F.interpolate(batch, size=size, mode=_MODES[resample], align_corners=False, antialias=True)
    return out if image.dim() == 4 else out[0]


def pad(image: Tensor, top: int, bottom: int, left: int, right: int, fill: tuple[int, int, int]) -> Tensor:
    """Pad uint8 `[3, H, W]` with one value a channel -> `[3, top + H + bottom, left + W + right]`."""
    if not (top or bottom or left or right):
        return image
    _, height, width = image.shape
    out = torch.tensor(fill, dtype=image.dtype)[:, None, None].repeat(
        1, top + height + bottom, left + width + right
    )
    out[:, top : top + height, left : left + width] = image
    return out


def pad_to(image: Tensor, size: tuple[int, int], fill: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """Centre uint8 `[3, H, W]` on a canvas of `size`; an odd pixel of padding goes below / to the right."""
    _, height, width = image.shape
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pad(image, top, size[0] - height - top, left, size[1] - width - left, fill)


def split(image: Tensor, tile: tuple[int, int]) -> Tensor:
    """Cut `[3, R*h, C*w]` into tiles of `tile` = (h, w), row by row -> `[R*C, 3, h, w]` (contiguous)."""
    channels, height, width = image.shape
    rows, columns = height // tile[0], width // tile[1]
    if (rows * tile[0], columns * tile[1]) != (height, width):
        raise ValueError(f"{height} x {width} does not divide into tiles of {tile[0]} x {tile[1]}")
    grid = image.reshape(channels, rows, tile[0], columns, tile[1]).permute(1, 3, 0, 2, 4)
    return grid.reshape(rows * columns, channels, *tile)


def _bilinear_is_native() -> bool:
    """Whether torchvision resizes bilinear uint8 natively on this CPU (its own rule)."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in (
        "aarch64",
        "arm64",
    )
