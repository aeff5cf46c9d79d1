"""Aria checkpoints that store one weight per expert (`rhymes-ai/Aria-sequential_mlp` and its derivatives).

The same model as `rhymes-ai/Aria`, its experts unrolled into Linear layers. transformers knows the fused
layout only: it would report the experts as missing, initialise them at random and go on. The one idea: tell
its weight loader how to stack them; fused checkpoints load as before.
"""

from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter


def accept_sequential_experts() -> None:
    """Let transformers load per-expert Aria checkpoints in this process; more than one call changes nothing.

    A `*` matches `experts.0` and `experts.experts.0`; Linear stores `[out, in]`, fused experts `[in, out]`.
    """
    known = get_checkpoint_conversion_mapping("aria_text") or []
    if any(isinstance(conversion, WeightConverter) for conversion in known):
        return
    gate_up = WeightConverter(
        source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        target_patterns="mlp.experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)],
    )
    down = WeightConverter(
        source_patterns="mlp.experts.*.down_proj.weight",
        target_patterns="mlp.experts.down_proj",
        operations=[MergeModulelist(dim=0), Transpose(1, 2)],
    )
    register_checkpoint_conversion_mapping("aria_text", [*known, gate_up, down], overwrite=True)
