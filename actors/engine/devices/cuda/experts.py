"""Mixtures of experts on CUDA: all experts in one grouped product, which never waits for the host."""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.engine.devices.base import experts_of
from actors.engine.devices.proof import Choice

_GROUPED = "AriaGroupedExpertsGemm"
"""Half of Aria's experts in transformers before 5.23, which has no experts interface for them."""


def choose_experts(model: PreTrainedModel) -> Choice:
    """Picks `grouped_mm` for the experts of `model`, where it has any."""
    old = [module for module in model.modules() if type(module).__name__ == _GROUPED]
    for module in old:
        module.forward = MethodType(_grouped_product, module)
    if experts_of(model):
        model.set_experts_implementation({"text_config": "grouped_mm"})
    elif not old:
        return Choice("none")
    return Choice("grouped_mm")


def _grouped_product(layer: nn.Module, tokens: Tensor, counts: Tensor) -> Tensor:
    """tokens [N, in], sorted by expert, and how many each of E experts has -> [N, out]. The stock one fetches the
    counts from the device, which a CUDA graph cannot, and computes one expert after the other."""
    return F.grouped_mm(tokens, layer.weight, offs=counts.cumsum(0, dtype=torch.int32))  # type: ignore[arg-type]
