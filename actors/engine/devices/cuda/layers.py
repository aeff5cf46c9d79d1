"""The models' layers, re-arranged for CUDA: fewer and larger products, pointwise work fused.

Products of the same input are one product (query, key and value; gate and up), and what stands between products is one
kernel each (`pointwise.py`). A kind of module is replaced only after a replacement has computed what the stock module
computes, on the device and with the checkpoint's own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from actors.engine.devices.proof import Choice, Path, check_close, choose

_PROOF_ROWS = (1, 7, 64)
_CENTERED = {"Qwen2RMSNorm": False, "AriaTextRMSNorm": False, "Cohere2LayerNorm": True}
"""By name: they are no common class, and a norm of another model with the same fields may mean 1 + weight."""


@dataclass(frozen=True, slots=True)
class _Rotary:
    interleaved: bool
    windowed_only: bool
    """Whether only layers with a sliding window rotate."""


_ROTARY = {
    "Qwen2Attention": _Rotary(False, False),
    "AriaTextAttention": _Rotary(False, False),
    "Cohere2Attention": _Rotary(True, True),
}


class FusedNorm(nn.Module):
    """RMSNorm, or LayerNorm without a bias, in one kernel."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight, self.eps = stock.weight, stock.variance_epsilon
        self.centered = _CENTERED[type(stock).__name__]

    def forward(self, x: Tensor) -> Tensor:
        from actors.engine.devices.cuda.pointwise import normalized

        return normalized(x, self.weight, self.eps, self.centered)


class FusedGatedMLP(nn.Module):
    """A frozen feed-forward block, down(silu(gate(x)) * up(x)), in two products and one kernel."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        from actors.engine.devices.cuda.pointwise import silu_mul

        both: Tensor = self.gate_up(x)
        inner = silu_mul(both.flatten(0, -2)).unflatten(0, both.shape[:-1])
        output: Tensor = self.down_proj(inner)
        return output


class FusedAttention(nn.Module):
    """A frozen attention block of rotary embeddings: one product for query, key and value, one kernel that rotates."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.qkv, self.o_proj = _joined(stock.q_proj, stock.k_proj, stock.v_proj), stock.o_proj
        self.layer_idx, self.head_dim, self.scaling = stock.layer_idx, stock.head_dim, stock.scaling
        self.sliding_window = getattr(stock, "sliding_window", None)
        self.heads = stock.q_proj.out_features // self.head_dim
        self.shared = stock.k_proj.out_features // self.head_dim
        rotary = _ROTARY[type(stock).__name__]
        self.interleaved = rotary.interleaved
        self.rotates = self.sliding_window is not None or not rotary.windowed_only

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], step: Any, **_: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [1, N, D], cos and sin [1, N, d] -> [1, N, D]."""
        from actors.engine.devices.cuda.pointwise import rotate

        heads = self.qkv(hidden_states[0]).unflatten(1, (-1, self.head_dim))  # [N, H + 2 H_kv, d]
        if self.rotates:
            cos, sin = position_embeddings
            rotate(heads, self.heads + self.shared, cos[0], sin[0], self.interleaved)
        query, key, value = heads.transpose(0, 1)[None].split((self.heads, self.shared, self.shared), dim=1)
        attended = step.attend(self.layer_idx, query, key, value, self.scaling, self.sliding_window)
        return self.o_proj(attended.flatten(2)), None


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of module that has a fused form."""

    name: str
    fits: Callable[[Any], bool]
    fused: Callable[[Any], nn.Module]
    compute: Callable[[PreTrainedModel, nn.Module, Tensor], list[Tensor]]
    """What a module, stock or fused, makes of x [1, N, D]."""


def prepare_layers(model: PreTrainedModel) -> Choice:
    """Replaces the norms, feed-forward and attention blocks of a frozen model's text layers by fused ones, each kind
    where it proves itself. Raises DeviceLost."""
    text = model.model.language_model
    fused, against = [], []
    for kind in _KINDS:
        places = [
            (parent, name, child)
            for parent in text.modules()
            for name, child in parent.named_children()
            if kind.fits(child)
        ]
        if not places:
            continue
        stock = {_shape(child): child for _, _, child in places}.values()
        paths = [Path("fused", partial(_prove, kind, text, list(stock))), Path("stock")]
        choice = choose(f"layers ({kind.name})", paths, model.device)
        if choice.path == "stock":
            against.append(f"{kind.name}: {choice.why}")
            continue
        fused.append(kind.name)
        for parent, name, child in places:
            setattr(parent, name, kind.fused(child))
    return Choice(f"fused {', '.join(fused)}" if fused else "stock", "; ".join(against))


def _prove(kind: _Kind, text: PreTrainedModel, modules: Sequence[nn.Module]) -> None:
    """Compares the fused form of `modules`, one of each shape, with themselves."""
    generator = torch.Generator(text.device).manual_seed(0)
    with torch.inference_mode():
        for module in modules:
            fused = kind.fused(module)
            width = next(module.parameters()).shape[-1]
            for rows in _PROOF_ROWS:
                x = torch.randn(1, rows, width, generator=generator, device=text.device, dtype=text.dtype)
                where = f"in {type(module).__name__} at {rows} rows"
                for found, exact in zip(
                    kind.compute(text, fused, x), kind.compute(text, module, x), strict=True
                ):
                    check_close(found, exact, where)


def _shape(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules that compute alike."""
    sizes = tuple(tuple(parameter.shape) for parameter in module.parameters())
    return type(module), sizes, getattr(module, "sliding_window", None)


def _is_gated_mlp(module: nn.Module) -> bool:
    layers = dict(module.named_children())
    return (
        isinstance(layers.pop("act_fn", None), type(ACT2FN["silu"]))
        and layers.keys() == {"gate_proj", "up_proj", "down_proj"}
        and all(type(layer) is nn.Linear for layer in layers.values())
    )


def _joined(*layers: nn.Linear) -> nn.Linear:
    """One layer of the outputs of several, of the same inputs."""
    weight = torch.cat([layer.weight for layer in layers])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if layers[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return joined


class _Recorder:
    """A step that attends to nothing, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        self.asked = [query, key, value, torch.tensor([layer, scaling, window or 0], dtype=torch.float64)]
        return query.transpose(1, 2)


def _attended(text: PreTrainedModel, module: nn.Module, x: Tensor) -> list[Tensor]:
    positions = torch.arange(x.shape[1], device=x.device)[None] * 37
    recorder = _Recorder()
    rotary = text.rotary_emb(x, positions)
    output = module(hidden_states=x, position_embeddings=rotary, attention_mask=None, step=recorder)[0]
    return [output, *recorder.asked]


def _called(text: PreTrainedModel, module: nn.Module, x: Tensor) -> list[Tensor]:
    return [module(x)]


_KINDS = (
    _Kind("norms", lambda module: type(module).__name__ in _CENTERED, FusedNorm, _called),
    _Kind("feed-forward", _is_gated_mlp, FusedGatedMLP, _called),
    _Kind("attention", lambda module: type(module).__name__ in _ROTARY, FusedAttention, _attended),
)
