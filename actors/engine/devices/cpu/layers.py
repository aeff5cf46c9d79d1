"""The models' layers, re-arranged for a CPU: weights packed for its matrix kernels (oneDNN), fewer passes over memory.

The default kernel re-arranges a weight on every call, which dominates when few tokens decode. Packed
once, float32 products of 16 - 32 rows run 1.7 - 2 times as fast and long prompts' 1.1 - 1.3 times (two Zen 4 cores).
What follows a product is applied while its tiles are in cache. The operators are those that torch's own compiler
emits; where they are missing, layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from actors.engine.devices.proof import Choice, check_close, reason

_FUSED: dict[type, tuple[str, str]] = {
    type(ACT2FN["silu"]): ("swish", ""),
    type(ACT2FN["gelu_pytorch_tanh"]): ("gelu", "tanh"),
}


def bucket(rows: int) -> int:
    """`rows`, or a few more: how many of them a product is to have.

    The library makes a kernel for every new number of rows and keeps a thousand of them, and packed steps have any
    number: that came to 800 MiB. Few buckets, all soon known, cost a few rows of padding instead.

    >>> [bucket(rows) for rows in (1, 4, 61, 65, 500, 513)]
    [4, 4, 64, 96, 512, 576]
    """
    size = 4 if rows <= 64 else 32 if rows <= 512 else 64
    return -(-rows // size) * size


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` whose weight is an opaque packed tensor of the same shape and dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.then: tuple[str, str] = ("none", "")
        """The activation, and its variant, applied while the product's tiles are still in cache."""

    def forward(self, x: Tensor) -> Tensor:
        name, variant = self.then
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], variant)
        return output

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, packed"


class PackedGatedMLP(nn.Module):
    """A frozen feed-forward block, down(act(gate(x)) * up(x)); the product, too, is applied to tiles in cache."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        layers = (getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
        self.gate_proj, self.up_proj, self.down_proj = (
            PackedLinear(layer.weight, layer.bias) for layer in layers
        )
        self.gate_proj.then = _FUSED[type(mlp.act_fn)]

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj
        product = torch.ops.mkldnn._linear_pointwise.binary
        output: Tensor = self.down_proj(product(x, self.gate_proj(x), up.weight, up.bias, "mul"))
        return output


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight, in half of the stock modules' passes over x."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight, self.eps = stock.weight, stock.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = squares.div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return (x * scale).to(x.dtype).mul_(self.weight)


class PackedAttention(nn.Module):
    """A frozen `nn.MultiheadAttention` (batch first), as Aria's projector attends to its patches. The stock module
    projects its inputs as views of the other order, and so with one small product a patch."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        self.q_proj, self.k_proj, self.v_proj = (PackedLinear(weight, bias) for weight, bias in parts)
        self.out_proj = PackedLinear(attention.out_proj.weight, attention.out_proj.bias)
        self.heads = attention.num_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query [B, Q, D], key and value [B, N, D], `attn_mask` bool [B * heads, Q, N], True where a query must not
        look -> [B, Q, D]."""
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = None
        if attn_mask is not None:
            if attn_mask.stride(1) == 0:  # the same for every query: once is enough
                attn_mask = attn_mask[:, :1]
            hidden = attn_mask.unflatten(0, (-1, self.heads))
            mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def prepare_layers(model: nn.Module) -> Choice:
    """Replaces the plain linear layers of a frozen CPU model in float32 or bfloat16, and blocks made of them, by packed
    ones, and its norms by quicker ones; each kind and shape once it has computed what the stock module computes.

    Other holders of a weight (embeddings tied to the output layer) keep theirs: only then is it in memory twice.
    """
    if not _available():
        return Choice("stock", "packed: oneDNN has none of its operators here")
    verdicts: dict[tuple[object, ...], str] = {}
    replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            build = _replacement(child)
            if build is None:
                continue
            kind = type(child).__name__, *(parameter.shape for parameter in child.parameters())
            if verdicts.get(kind):
                continue
            packed = build(child)
            if kind not in verdicts:
                verdicts[kind] = _against(packed, child)
            if not verdicts[kind]:
                setattr(module, name, packed)
                replaced += 1
        if against := _fuse_activation(module):
            verdicts[f"{type(module).__name__}'s activation",] = against
    why = [f"{kind[0]}: {verdict}" for kind, verdict in verdicts.items() if verdict]
    if not replaced and not why:
        return Choice("stock", "packed: oneDNN computes in no such dtype here")
    return Choice("packed" if replaced else "stock", "; ".join(why))


def _replacement(child: nn.Module) -> Callable[[Any], nn.Module] | None:
    if _is_gated_mlp(child):
        return PackedGatedMLP
    if _is_plain_attention(child):
        return PackedAttention
    if _is_plain_linear(child):
        return lambda layer: PackedLinear(layer.weight, layer.bias)
    norm = _NORMS.get(type(child).__name__)
    return norm if norm and child.get_parameter("weight").dtype in _dtypes() else None


def _against(packed: nn.Module, stock: nn.Module) -> str:
    """What speaks against `packed` in the place of `stock`: nothing where it computes the same."""
    generator = torch.Generator().manual_seed(0)
    try:
        for rows in (1, 7, 64):
            weight = next(stock.parameters())
            x = torch.randn(1, rows, weight.shape[-1], generator=generator).to(weight.dtype)
            given = (x, x, x) if isinstance(stock, nn.MultiheadAttention) else (x,)
            found, exact = (_first(module(*given)) for module in (packed, stock))
            check_close(found, exact, f"at {rows} rows")
    except Exception as error:
        return reason(error)
    return ""


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _layer_norm(stock: Any) -> nn.Module:
    norm = nn.LayerNorm(stock.weight.shape, stock.variance_epsilon, bias=False)
    norm.weight = stock.weight
    return norm


_NORMS: dict[str, Callable[[Any], nn.Module]] = {
    "Qwen2RMSNorm": RMSNorm,
    "AriaTextRMSNorm": RMSNorm,
    "Cohere2LayerNorm": _layer_norm,
}
"""By name: they are no common class, and a norm of another model with the same fields may mean 1 + weight."""


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and module.weight.dtype in _dtypes()


def _is_gated_mlp(module: nn.Module) -> bool:
    layers = dict(module.named_children())
    activation = layers.pop("act_fn", None)
    return (
        type(activation) in _FUSED
        and layers.keys() == {"gate_proj", "up_proj", "down_proj"}
        and all(map(_is_plain_linear, layers.values()))
    )


def _is_plain_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    return (
        isinstance(module, nn.MultiheadAttention)
        and module.batch_first
        and module.in_proj_weight is not None  # keys and values as wide as queries
        and module.in_proj_weight.dtype in _dtypes()
        and module.in_proj_bias is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )


def _fuse_activation(block: nn.Module) -> str:
    """Lets a vision tower's first feed-forward layer apply the activation that follows it, unless that computes
    something else; returns what speaks against it."""
    layer, function = getattr(block, "fc1", None), getattr(block, "activation_fn", None)
    if not (isinstance(layer, PackedLinear) and isinstance(function, nn.Module) and type(function) in _FUSED):
        return ""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, layer.in_features, generator=generator).to(layer.weight.dtype)
    exact = function(layer(x))
    layer.then = _FUSED[type(function)]
    try:
        check_close(layer(x), exact, "at 7 rows")
    except Exception as error:
        layer.then = ("none", "")
        return reason(error)
    block.activation_fn = nn.Identity()
    return ""


@cache
def _dtypes() -> frozenset[torch.dtype]:
    """What oneDNN computes in on this machine."""
    with_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset([torch.float32, *([torch.bfloat16] if with_bfloat16 else [])])


def _available() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        probe = PackedLinear(torch.zeros(8, 8), None)
        probe(torch.zeros(1, 8))
    except (AttributeError, RuntimeError):
        return False
    return True
