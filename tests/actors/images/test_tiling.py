"""Core-torch resize and padding equal torchvision's, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.images import tiling

SIDES = st.integers(1, 300)


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7919 * height + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("resample", [tiling.NEAREST, tiling.LANCZOS, tiling.BILINEAR, tiling.BICUBIC])
@settings(derandomize=True, deadline=None, max_examples=60)
@given(height=SIDES, width=SIDES, to=st.tuples(SIDES, SIDES))
def test_resize_equals_torchvision(resample: int, height: int, width: int, to: tuple[int, int]) -> None:
    pytest.importorskip("torchvision")
    from torchvision.transforms.v2 import functional as tvF
    from transformers.image_utils import pil_torch_interpolation_mapping

    image = noise(height, width)
    interpolation = pil_torch_interpolation_mapping[resample]
    channels_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    # To a single pixel torchvision fails an assertion of torch's on a contiguous image.
    source = channels_last if to == (1, 1) else image
    expected = tvF.resize(source, list(to), interpolation=interpolation, antialias=True)
    assert torch.equal(tiling.resize(image, to, resample), expected)
    assert torch.equal(tiling.resize(channels_last, to, resample), expected)


def test_resize_to_one_pixel() -> None:
    image = torch.stack([torch.full((8, 6), value, dtype=torch.uint8) for value in (1, 128, 255)])
    for resample in (tiling.NEAREST, tiling.LANCZOS, tiling.BILINEAR, tiling.BICUBIC):
        assert tiling.resize(image, (1, 1), resample).flatten().tolist() == [1, 128, 255]


def test_resize_takes_batches() -> None:
    batch = torch.stack([noise(20, 30), noise(20, 30).flip(1)])
    one_by_one = torch.stack([tiling.resize(image, (7, 9), tiling.BICUBIC) for image in batch])
    assert torch.equal(tiling.resize(batch, (7, 9), tiling.BICUBIC), one_by_one)


def test_resize_refuses_unknown_filters() -> None:
    with pytest.raises(ValueError, match="resample=4"):
        tiling.resize(noise(2, 2), (3, 3), 4)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(height=st.integers(1, 40), width=st.integers(1, 40), top=st.integers(0, 9), left=st.integers(0, 9))
def test_padding_centres(height: int, width: int, top: int, left: int) -> None:
    image = noise(height, width)
    out = tiling.pad_to(image, (height + top, width + left), (1, 2, 3))
    assert tuple(out.shape) == (3, height + top, width + left)
    row, column = top // 2, left // 2
    assert torch.equal(out[:, row : row + height, column : column + width], image)
    out[:, row : row + height, column : column + width] = torch.tensor([1, 2, 3])[:, None, None]
    assert torch.equal(out, torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand_as(out))


def test_split_goes_row_by_row() -> None:
    image = noise(4, 9)
    tiles = tiling.split(image, (2, 3))
    assert tuple(tiles.shape) == (6, 3, 2, 3) and tiles.is_contiguous()
    for index in range(6):
        row, column = divmod(index, 3)
        expected = image[:, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert torch.equal(tiles[index], expected)
    with pytest.raises(ValueError, match="4 x 9 does not divide"):
        tiling.split(image, (3, 3))
