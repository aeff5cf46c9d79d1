"""Aria checkpoints that store one weight per expert (`rhymes-ai/Aria-sequential_mlp` and its derivatives).

The same model as `rhymes-ai/Aria`, its experts unrolled into Linear layers. transformers knows the fused
layout only: it would report the experts as missing, initialise them at random and go on. Tell
its weight loader how to stack them; fused checkpoints load as before.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter


@contextmanager
def accept_sequential_experts() -> Iterator[None]:
    """Within it, `from_pretrained` loads per-expert Aria checkpoints too.

    Not for longer: the mapping is also used backwards, and would change what `save_pretrained` writes.
    A `*` matches `experts.0` and `experts.experts.0`; Linear stores `[out, in]`, fused experts `[in, out]`.
    """
    known = get_checkpoint_conversion_mapping("aria_text") or []
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
    try:
        yield
    finally:
        register_checkpoint_conversion_mapping("aria_text", known, overwrite=True)
