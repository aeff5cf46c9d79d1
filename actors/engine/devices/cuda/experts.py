"""Mixtures of experts on CUDA: all experts in one grouped product, which never waits for the host."""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.engine.devices.base import experts_of
from actors.engine.devices.proof import Choice, Path, check_close, choose

_GROUPED = "AriaGroupedExpertsGemm"
"""Half of Aria's experts in transformers before 5.23, which has no experts interface for them."""


@torch.inference_mode()
def choose_experts(model: PreTrainedModel) -> Choice:
    """Picks `grouped_mm` for the experts of `model`, where it has any and agrees with the loop over them."""
    old = [module for module in model.modules() if type(module).__name__ == _GROUPED]
    new = experts_of(model)
    if not old and not new:
        return Choice("none")

    def prove() -> None:
        for layer in [*{each.weight.shape: each for each in old}.values()]:
            counts = torch.arange(len(layer.weight), device=layer.weight.device) % 3
            tokens = torch.randn(
                int(counts.sum()),
                layer.weight.shape[1],
                dtype=layer.weight.dtype,
                device=layer.weight.device,
            )
            check_close(
                _grouped_product(layer, tokens, counts), layer(tokens, counts), "in a grouped product"
            )
        for layer in new[:1]:
            _prove_interface(model, layer)

    device = next(model.parameters()).device
    choice = choose("experts", [Path("grouped_mm", prove), Path("loop")], device)
    if choice.path == "grouped_mm":
        for module in old:
            module.forward = MethodType(_grouped_product, module)
    if new:
        implementation = "grouped_mm" if choice.path == "grouped_mm" else "eager"
        model.set_experts_implementation({"text_config": implementation})
    return choice


def _prove_interface(model: PreTrainedModel, experts: nn.Module) -> None:
    """Runs `experts` on random tokens by both implementations."""
    weight = experts.get_parameter("down_proj")
    count, width = weight.shape[0], model.config.get_text_config().hidden_size
    tokens = torch.randn(37, width, dtype=weight.dtype, device=weight.device)
    scores, chosen = torch.rand(37, count, device=weight.device).topk(min(2, count))
    found = []
    for implementation in ("grouped_mm", "eager"):
        model.set_experts_implementation({"text_config": implementation})
        found.append(experts(tokens, chosen, scores.to(weight.dtype)))
    check_close(found[0], found[1], "at 37 tokens")


def _grouped_product(layer: nn.Module, tokens: Tensor, counts: Tensor) -> Tensor:
    """tokens [N, in], sorted by expert, and how many each of E experts has -> [N, out]. The stock one fetches the
    counts from the device, which a CUDA graph cannot, and computes one expert after the other."""
    return F.grouped_mm(tokens, layer.weight, offs=counts.cumsum(0, dtype=torch.int32))  # type: ignore[arg-type]
