"""The reference engine: transformers' own `generate`, one row at a time.

It is the oracle that every faster engine is compared with, and the fallback for what they do not support.
Nothing here is clever on purpose: the stock model, the stock loop, a batch of one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from threading import Lock

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from actors.engine.devices.base import device_name
from actors.engine.failures import is_fatal, is_out_of_memory, row_error
from actors.engine.stopping import stop_strings
from actors.engine.types import Completion, EngineRecord, Request, Sampling
from actors.families.base import Family


class ReferenceEngine:
    """`model.generate` row by row, on the model's device and in its dtype."""

    def __init__(self, family: Family, model: PreTrainedModel) -> None:
        self.family = family
        self.model = model.eval()
        self.model.generation_config.stop_strings = None  # the family has them; see _StopStrings
        self.record = EngineRecord(
            engine="reference",
            device=device_name(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )
        self._turn = Lock()  # callers take turns, row by row: torch's random state is the process's

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            try:
                with self._turn:
                    completion = self._generate_row(request)
                yield completion
            except Exception as error:  # one odd row must not take the others with it
                if is_fatal(error):
                    raise
                if is_out_of_memory(error) and torch.cuda.is_available():
                    torch.cuda.empty_cache()
                yield Completion(request.key, (), None, "error", row_error(error))

    @torch.inference_mode()
    def _generate_row(self, request: Request) -> Completion:
        device, sampling = self.model.device, request.sampling
        input_ids = torch.tensor(request.token_ids, dtype=torch.long, device=device)[None]
        inputs = {}
        if len(request.layouts):
            pixels = torch.tensor(request.pixels, device=device)
            inputs = {
                name: value.to(self.model.dtype) if value.is_floating_point() else value
                for name, value in self.family.model_inputs(pixels, request.layouts).items()
            }
        stops = stop_strings(self.family, sampling)
        stop = _StopStrings(self.family, stops, prompt_length=input_ids.shape[1])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=self._generation_config(sampling),
                stopping_criteria=StoppingCriteriaList([stop] if stops else []),
                **inputs,
            )
        ids = output[0, input_ids.shape[1] :].tolist()
        return complete(self.family, request, ids)

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        # From the checkpoint's own, so that what the specification does not name (suppressed tokens, ...) holds.
        config = copy.deepcopy(self.model.generation_config)
        sample = sampling.temperature > 0
        eos = sorted(self.family.eos_token_ids)
        config.update(
            max_new_tokens=sampling.max_new_tokens,
            max_length=None,
            do_sample=sample,
            temperature=sampling.temperature if sample else 1.0,
            top_p=sampling.top_p if sample else 1.0,
            top_k=sampling.top_k if sample else 0,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=eos or None,
            pad_token_id=eos[0] if eos else 0,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
        )
        return config


def complete(family: Family, request: Request, ids: list[int]) -> Completion:
    """Turns generated ids into a completion: cut before the end-of-sequence token or the first stop string."""
    finished = bool(ids) and ids[-1] in family.eos_token_ids
    text = family.decode(ids[:-1] if finished else ids)
    cut = [at for at in map(text.find, stop_strings(family, request.sampling)) if at >= 0]
    if cut:
        text, finished = text[: min(cut)], True
    return Completion(request.key, tuple(ids), text.strip(), "stop" if finished else "length")


class _StopStrings(StoppingCriteria):
    """Stops a row when its new text holds a stop string. transformers' own criterion spends over a second per
    `generate` call on a large vocabulary to build its tables; looking at the text is exact and free."""

    def __init__(self, family: Family, stop: tuple[str, ...], prompt_length: int) -> None:
        self.family, self.stop, self.prompt_length = family, stop, prompt_length

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object
    ) -> torch.BoolTensor:
        text = self.family.decode(input_ids[0, self.prompt_length :].tolist())
        stopped = any(stop in text for stop in self.stop)
        return torch.full((len(input_ids),), stopped, device=input_ids.device)  # type: ignore[return-value]
