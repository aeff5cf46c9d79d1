"""Mixtures of experts on a CPU: the compiled kernel, or the model's own loop over experts.

Experts are reached through transformers' experts interface, so the model's own layers stay as they are;
what is picked is picked explicitly, because the default depends on the transformers version.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from actors.engine.devices.base import experts_of
from actors.engine.devices.cpu.kernels import KERNEL_DTYPES, ExpertsKernel, experts_can_be_compiled
from actors.engine.devices.cpu.proofs import prove_experts
from actors.engine.devices.proof import Choice, Path, choose

EXPERTS = "tessera"


def choose_experts(model: PreTrainedModel) -> Choice:
    """Picks how the experts of `model`, where it has any, are computed: by the compiled kernel (in float32 a decoding
    step of 13 rows of Aria's mini model, on two Zen 5 cores: 24 ms, against 46 with one packed product after the
    other), otherwise by the model's own loop."""
    experts = experts_of(model)
    if not experts:
        return Choice("none")
    choice = choose(
        "experts", [Path("compiled", partial(_prove, model, experts)), Path("loop")], model.device
    )
    if choice.path == "loop":
        model.set_experts_implementation({"text_config": "eager"})
        return choice
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for module in experts:
        _pack(module)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _forward)
    model.set_experts_implementation({"text_config": EXPERTS})
    return choice


def _prove(model: PreTrainedModel, experts: Sequence[nn.Module]) -> None:
    if not all(_can_pack(module) for module in experts):
        raise NotImplementedError("none for this dtype, layout or activation")
    if not experts_can_be_compiled(model.dtype):
        raise NotImplementedError("no C compiler")
    prove_experts(model, experts[0])


def _can_pack(experts: nn.Module) -> bool:
    return (
        getattr(experts, "is_transposed", False)
        and not getattr(experts, "has_bias", False)
        and isinstance(experts.act_fn, type(ACT2FN["silu"]))
        and experts.gate_up_proj.dtype in KERNEL_DTYPES
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
