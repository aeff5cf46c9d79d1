"""Generation rules: what a checkpoint's generation_config.json asks of every text, beyond the job spec.

Asked for is applied or refused, never ignored. The rules here only forbid ids, so their order among
themselves and the repetition penalty does not matter, and greedy tokens stay `generate`'s. What would change tokens
in any other way is refused by name when the engine is built; the reference engine applies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from actors.engine.scheduler import SequenceState
from actors.engine.transfer import upload
from actors.families.checkpoint import CheckpointError

# Fields that change tokens -> the values at which they do not. Not here: what the job spec sets itself (lengths,
# temperature, top_k, top_p, repetition_penalty, beams), and what only concerns beams or speed.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "guidance_scale": (None, 1.0),
    "sequence_bias": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
}
_UNSUPPORTED_SAMPLING: dict[str, tuple[object, ...]] = {
    "top_h": (None,),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}
"""As above, of rows that sample: greedy rows do not ask for them."""


@dataclass(frozen=True, slots=True)
class CheckpointRules:
    """Ids that may not come next: never, as the first token, or as long as the text is short."""

    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    min_new_tokens: int = 0
    """No end of sequence before this many tokens of text."""
    min_length: int = 0
    """No end of sequence before this many tokens of prompt and text together."""
    unsupported_sampling: tuple[str, ...] = ()
    """Fields that the config sets and that rows which sample would need."""

    @classmethod
    def of(cls, config: GenerationConfig, eos: Iterable[int], vocabulary: int) -> CheckpointRules:
        """The rules of a checkpoint with end-of-sequence ids `eos` and logits of `vocabulary` ids. Raises
        CheckpointError for what has no rule here."""
        for name, harmless in _UNSUPPORTED.items():
            if getattr(config, name, None) not in harmless:
                raise _refusal(name, config)
        bad = [list(ids) for ids in config.bad_words_ids or ()]
        if any(len(ids) != 1 for ids in bad):
            raise _refusal("bad_words_ids", config)
        ends = set(eos)
        banned = {*(config.suppress_tokens or ()), *({ids[0] for ids in bad} - ends)}

        def known(ids: Iterable[int]) -> tuple[int, ...]:  # an id that the model does not have is no error
            return tuple(sorted({token for token in ids if 0 <= token < vocabulary}))

        return cls(
            suppressed=known(banned),
            suppressed_first=known(config.begin_suppress_tokens or ()),
            eos=known(ends),
            min_new_tokens=config.min_new_tokens or 0,
            # min_new_tokens takes min_length's place, as in `generate`.
            min_length=0 if config.min_new_tokens is not None else config.min_length or 0,
            unsupported_sampling=tuple(
                name
                for name, harmless in _UNSUPPORTED_SAMPLING.items()
                if getattr(config, name, None) not in harmless
            ),
        )

    def apply(self, scores: Tensor, sequences: Sequence[SequenceState]) -> Tensor:
        """scores [R, V], one row a sequence -> the same with forbidden ids at -inf; `scores` itself is left alone."""
        first = [index for index, sequence in enumerate(sequences) if not sequence.sampled]
        short = [index for index, sequence in enumerate(sequences) if self._is_short(sequence)]
        everywhere = list(range(len(sequences)))
        for rows, ids in (
            (everywhere, self.suppressed),
            (first, self.suppressed_first),
            (short, self.eos),
        ):
            if rows and ids:
                at = (
                    upload(np.array(rows)[:, None], scores.device),
                    upload(np.array(ids)[None], scores.device),
                )
                scores = scores.index_put(at, scores.new_full((), float("-inf")))
        return scores

    def _is_short(self, sequence: SequenceState) -> bool:
        length = sequence.sampled
        return length < self.min_new_tokens or sequence.prompt_length + length < self.min_length


def check_positions(text_config: PreTrainedConfig) -> None:
    """Raises CheckpointError for rotary embeddings whose frequencies transformers takes from the longest row of a
    forward pass (rope types `dynamic` and `longrope`): packed, a row's text would depend on the rows beside it."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    layered = [each for each in parameters.values() if isinstance(each, dict)]  # one for each kind of layer
    for each in layered or [parameters]:
        kind = each.get("rope_type") or "default"
        if "dynamic" in kind or kind == "longrope":
            raise CheckpointError(
                f"the checkpoint's config.json sets rope_type={kind!r}, whose frequencies depend on a row's length, "
                "which the continuous engine cannot apply to rows together; model.engine: reference applies it"
            )


def _refusal(name: str, config: GenerationConfig) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's generation_config.json sets {name}={getattr(config, name)!r}, which the continuous "
        "engine cannot apply; model.engine: reference applies it"
    )
