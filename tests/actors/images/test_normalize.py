"""The 3 x 256 table gives the stock torchvision backend's floats, bit for bit."""

import pytest
import torch

from actors.images.normalize import PixelTable

CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


@pytest.mark.parametrize("mean_std", [CLIP, HALF])
@pytest.mark.parametrize("factor", [1 / 255, 1 / 127.5])
@pytest.mark.parametrize(
    ("do_rescale", "do_normalize"), [(True, True), (False, True), (True, False), (False, False)]
)
def test_table_equals_stock(mean_std, factor: float, do_rescale: bool, do_normalize: bool) -> None:
    pytest.importorskip("torchvision")
    from transformers import LlavaOnevisionImageProcessor

    mean, std = mean_std
    pixels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 4, 1)
    expected = LlavaOnevisionImageProcessor().rescale_and_normalize(
        pixels, do_rescale, factor, do_normalize, tuple(mean), tuple(std)
    )
    table = PixelTable(mean, std, factor, do_rescale, do_normalize)
    assert torch.equal(table(pixels), expected.float())
    assert table(pixels).shape == pixels.shape
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(table(pixels, dtype), expected.to(dtype))


def test_empty_and_strided_pixels() -> None:
    table = PixelTable(*CLIP)
    assert table(torch.empty((0, 3, 4, 4), dtype=torch.uint8)).shape == (0, 3, 4, 4)
    pixels = torch.randint(0, 256, (2, 6, 5, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    assert torch.equal(table(pixels), table(pixels.contiguous()))
