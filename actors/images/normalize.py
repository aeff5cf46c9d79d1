"""uint8 pixels -> normalised floats, on the model's device.

Rescale and normalise is a function of one byte and its channel, so it is a 3 x 256 table.
Computed once with the stock (torchvision-backend) arithmetic, looking bytes up gives the stock processor's
floats bit for bit on any device, while pixels travel at a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class PixelTable:
    """Looks uint8 pixels up in the 3 x 256 table of a processor config."""

    def __init__(
        self,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        rescale_factor: float = 1 / 255,
        do_rescale: bool = True,
        do_normalize: bool = True,
    ) -> None:
        bytes_ = torch.arange(256, dtype=torch.float32).repeat(3, 1)
        mean_, std_ = torch.tensor(mean).expand(3), torch.tensor(std).expand(3)
        if do_rescale and do_normalize:
            # The stock backend folds the rescale into mean and std; the order of roundings matters.
            mean_, std_ = mean_ * (1.0 / rescale_factor), std_ * (1.0 / rescale_factor)
        if do_normalize:
            values = (bytes_ - mean_[:, None]) / std_[:, None]
        elif do_rescale:
            values = bytes_ * rescale_factor
        else:
            values = bytes_
        self.values = values.contiguous()
        """float32 [3, 256]: the normalised value of every byte, a row a channel."""
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PixelTable:
        """The table of a processor's fields; mean and std must be there."""
        optional = {"rescale_factor", "do_rescale", "do_normalize"} & set(config)
        return cls(config["image_mean"], config["image_std"], **{name: config[name] for name in optional})

    def __call__(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 `[..., 3, h, w]` on any device -> `dtype`, same shape and device.

        Rounding the table to `dtype` equals rounding the floats: half precision needs no float32 pixels.
        """
        key = (pixels.device, dtype)
        if key not in self._on_device:
            self._on_device[key] = self.values.flatten().to(pixels.device, dtype)
        offsets = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=pixels.device)[:, None, None]
        index = pixels.to(torch.int32).add_(offsets)
        return self._on_device[key].index_select(0, index.flatten()).view(pixels.shape)
