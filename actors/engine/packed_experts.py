"""A mixture of experts on the CPU: tokens sorted by expert, each expert's weights packed once.

The one idea: like `packed_linear`, for weights that are stored [experts, in, out]. Stock implementations re-arrange an
expert's weight on every call: for 16 decoding tokens that is most of the time. Reached through transformers' experts
interface, so the model's own layers stay as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.engine.packed_linear import bucket

EXPERTS = "tessera"


def choose_experts(model: PreTrainedModel, packs: bool) -> None:
    """Picks how the experts of `model`, where it has any, are computed on its device; explicitly, because the default
    depends on the transformers version. `packs`: whether weights can be packed here.

    CUDA takes `grouped_mm`, which never waits for the host. On two Zen 4 cores (16 experts of 512 x 256, four a token)
    a layer took, for 16 tokens, 3.4 ms packed, 4.4 grouped_mm, 5.1 eager and 70 batched_mm; for 1024 tokens 57, 63,
    61 and more memory than there was.
    """
    experts = [module for module in model.modules() if _is_experts(module)]
    if not experts:
        return
    if model.device.type == "cuda":
        name = "grouped_mm"
    elif packs and all(_pack(module) for module in experts):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _forward)
        name = EXPERTS
    else:
        name = "eager"
    model.set_experts_implementation({"text_config": name})


def _is_experts(module: nn.Module) -> bool:
    return all(
        isinstance(getattr(module, name, None), nn.Parameter) for name in ("gate_up_proj", "down_proj")
    )


def _pack(experts: nn.Module) -> bool:
    """Adds the packed weights of each expert, [out, in], and lets go of the stored ones."""
    if not getattr(experts, "is_transposed", False) or getattr(experts, "has_bias", False):
        return False
    packed = []
    for name in ("gate_up_proj", "down_proj"):
        weights: Tensor = getattr(experts, name).detach()
        packed.append(
            [torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), None) for weight in weights]
        )
        setattr(experts, name, nn.Parameter(weights.new_empty(0), requires_grad=False))
    experts.packed = tuple(zip(*packed, strict=True))  # type: ignore[assignment]
    return True


def _forward(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden [N, D], the chosen experts and their weights [N, k] -> [N, D]."""
    tokens, chosen = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(ids, minlength=len(experts.packed))  # type: ignore[arg-type]
    # Every expert's rows are padded to a bucket, with copies of token 0 that nobody reads.
    padded = torch.tensor([bucket(count) for count in counts.tolist()])
    places = torch.arange(len(order)) + ((padded - counts).cumsum(0) - (padded - counts))[ids]
    rows = torch.zeros(int(padded.sum()), dtype=torch.int64)
    rows[places] = order // chosen
    linear = torch.ops.mkldnn._linear_pointwise
    outputs = []
    for part, (gate_up, down) in zip(hidden[rows].split(padded.tolist()), experts.packed, strict=True):  # type: ignore[arg-type]
        if len(part):
            gate, up = linear(part, gate_up, None, "none", [], "").chunk(2, dim=-1)
            outputs.append(linear(experts.act_fn(gate) * up, down, None, "none", [], ""))  # type: ignore[operator]
    # The weighted sum of a token's choices, gathered from where the experts left them.
    found = torch.empty_like(places)
    found[order] = places
    return F.embedding_bag(
        found.view(tokens, chosen),
        torch.cat(outputs),
        mode="sum",
        per_sample_weights=top_k_weights.to(hidden.dtype),
    )
