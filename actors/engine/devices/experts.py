"""Mixtures of experts: which kernel computes them, by device.

Experts are reached through transformers' experts interface, so the model's own layers stay as they are;
what is picked is picked explicitly, because the default depends on the transformers version.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from actors.engine.devices.cpu.kernels import ExpertsKernel, experts_can_be_compiled

EXPERTS = "tessera"
_GROUPED = "AriaGroupedExpertsGemm"
"""Half of Aria's experts in transformers before 5.23, which has no experts interface for them."""


def choose_experts(model: PreTrainedModel) -> None:
    """Picks how the experts of `model`, where it has any, are computed on its device.

    CUDA takes `grouped_mm`, which never waits for the host; a CPU the compiled kernel in float32 (a decoding step of 13
    rows of Aria's mini model, on two Zen 5 cores: 24 ms, against 46 with one packed product after the other),
    otherwise the model's own loop over experts.
    """
    for module in model.modules():
        if type(module).__name__ == _GROUPED:
            module.forward = MethodType(_grouped_product, module)
    experts = [module for module in model.modules() if _is_experts(module)]
    if not experts:
        return
    if model.device.type == "cuda":
        name = "grouped_mm"
    elif all(_can_pack(module) for module in experts) and experts_can_be_compiled():
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        for module in experts:
            _pack(module)
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _forward)
        name = EXPERTS
    else:
        name = "eager"
    model.set_experts_implementation({"text_config": name})


def _is_experts(module: nn.Module) -> bool:
    return all(
        isinstance(getattr(module, name, None), nn.Parameter) for name in ("gate_up_proj", "down_proj")
    )


def _can_pack(experts: nn.Module) -> bool:
    return (
        getattr(experts, "is_transposed", False)
        and not getattr(experts, "has_bias", False)
        and isinstance(experts.act_fn, type(ACT2FN["silu"]))
        and experts.gate_up_proj.dtype == torch.float32
    )


def _pack(experts: nn.Module) -> None:
    """Makes the kernel with its own copy of the weights, and lets go of the stored ones."""
    stored = [getattr(experts, name) for name in ("gate_up_proj", "down_proj")]
    experts.kernel = ExpertsKernel(*(weights.detach() for weights in stored))  # type: ignore[assignment]
    for weights in stored:
        weights.data = weights.new_empty(0)


def _forward(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden [N, D], the chosen experts and their weights [N, k] -> [N, D]."""
    return experts.kernel(hidden, top_k_index, top_k_weights)  # type: ignore[operator]


def _grouped_product(layer: nn.Module, tokens: Tensor, counts: Tensor) -> Tensor:
    """tokens [N, in], sorted by expert, and how many each of E experts has -> [N, out]. The stock one fetches the
    counts from the device, which a CUDA graph cannot, and computes one expert after the other."""
    return F.grouped_mm(tokens, layer.weight, offs=counts.cumsum(0, dtype=torch.int32))  # type: ignore[arg-type]
