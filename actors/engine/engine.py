"""The continuous-batching engine: sequences enter and leave at every step.

One thread runs steps over whatever is there; any number of callers submit requests and take their own
completions as they finish. So a caller's last rows decode beside the next caller's first ones, and the batch stays
full across their borders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.engine.checkpoint_rules import CheckpointRules, check_positions
from actors.engine.devices.base import Device
from actors.engine.devices.prepare import prepare_device
from actors.engine.failures import describe, is_fatal, is_out_of_memory, row_error, try_apart
from actors.engine.model.packed import use_packed_attention
from actors.engine.model.probe import check_packed, stock_states
from actors.engine.model.runner import ModelRunner
from actors.engine.prefix import find_prefix_source, prefix_key, shared_tokens
from actors.engine.reference import complete
from actors.engine.sampling import Tokens
from actors.engine.scheduler import Chunk, Limits, Scheduler, SequenceState
from actors.engine.stopping import Stopper
from actors.engine.types import Completion, DeviceLost, EngineRecord, Request
from actors.errors import RowError
from actors.families.base import Family

log = logging.getLogger(__name__)

_Launched = tuple[Sequence[Chunk], Tokens | None]
"""Chunks that were launched together, and what they sample, if anything."""

_IDLE_SECONDS = 5.0
_SMALLEST_CHUNK = 128
_CLEAN_STEPS = 512
"""Steps without running out of memory after which twice as much is tried again; twice as many after each time."""


class ContinuousEngine:
    """Generates for many requests at once, on the model's device and in its dtype. The model belongs to the engine.

    `limits` and `kv_tokens` (tokens of cache) are derived from the device unless given. Raises CheckpointError where
    the checkpoint asks for what this engine cannot do, and DeviceLost.
    """

    def __init__(
        self,
        family: Family,
        model: PreTrainedModel,
        limits: Limits | None = None,
        kv_tokens: int | None = None,
    ) -> None:
        self.family = family
        text = model.config.get_text_config()
        self.rules = CheckpointRules.of(model.generation_config, family.eos_token_ids, text.vocab_size)
        check_positions(text)
        stock = stock_states(model)
        use_packed_attention(model)
        device = prepare_device(model.eval(), family, limits, kv_tokens)
        self.cache = device.cache
        check_packed(model, device.cache, stock)
        self.runner = ModelRunner(family, model, device, self.rules)
        self.record = _record(device, self.runner)
        self.scheduler = Scheduler(device.limits, self._reserve, device.cache.release)
        self._stopper = Stopper(family)
        self._incoming: list[SequenceState] = []
        self._wake = Condition()
        self._thread: Thread | None = None
        self._lost: DeviceLost | None = None
        self._in_flight: list[_Launched] = []
        self._most, self._most_tiles = device.limits, device.tiles
        self._clean, self._patience = 0, _CLEAN_STEPS

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. Safe to call from several threads at once; requests are taken from the iterable
        only as far ahead as keeps the engine full. Raises DeviceLost."""
        finished: SimpleQueue[tuple[SequenceState, Completion | DeviceLost]] = SimpleQueue()
        outstanding: set[SequenceState] = set()
        left = iter(requests)
        exhausted = False
        try:
            while True:
                while not exhausted and len(outstanding) < 2 * self.scheduler.limits.sequences:
                    request = next(left, None)
                    if request is None:
                        exhausted = True
                        break
                    try:
                        sequence = self._sequence(request, finished)
                    except Exception as error:  # an odd request is its own matter too
                        yield Completion(request.key, (), None, "error", row_error(error))
                        continue
                    outstanding.add(sequence)
                    self._submit(sequence)
                if not outstanding:
                    return
                sequence, completion = finished.get()
                outstanding.discard(sequence)
                if isinstance(completion, DeviceLost):
                    raise completion
                yield completion
        finally:  # also where the caller stops listening
            for sequence in outstanding:
                sequence.cancelled = True

    def _sequence(self, request: Request, finished: SimpleQueue) -> SequenceState:
        if self.rules.unsupported_sampling and request.sampling.temperature > 0:
            fields = ", ".join(self.rules.unsupported_sampling)
            message = (
                f"the checkpoint's generation_config.json sets {fields}, which only model.engine: reference applies "
                "to sampled text"
            )
            raise RowError("generate", message)
        placeholders = self.family.placeholders(np.asarray(request.token_ids))
        sequence = SequenceState(request, emit=finished.put, placeholders=placeholders)
        if len(placeholders):
            sequence.prefix = int(placeholders[-1]) + 1
            sequence.prefix_key = prefix_key(sequence)
        return sequence

    def _submit(self, sequence: SequenceState) -> None:
        with self._wake:
            if self._lost is not None:
                raise self._lost
            self._incoming.append(sequence)
            if self._thread is None:
                # A daemon, and gone when idle: nobody has to close an engine.
                self._thread = Thread(target=self._work, name="tessera-engine", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _work(self) -> None:
        with torch.inference_mode():
            while self._take_incoming():
                try:
                    self._step()
                except Exception as error:
                    self._end(error)
                    return

    def _take_incoming(self) -> bool:
        """Hands new sequences to the scheduler; False after a while without any work."""
        with self._wake:
            if not self._incoming and not len(self.scheduler):
                self._wake.wait_for(lambda: bool(self._incoming), timeout=_IDLE_SECONDS)
            if not self._incoming and not len(self.scheduler):
                self._thread = None
                return False
            for sequence in self._incoming:
                self.scheduler.add(sequence)
            self._incoming.clear()
            return True

    def _end(self, error: Exception) -> None:
        """The device is gone, or the engine itself is broken: all callers hear of it, now and from here on."""
        lost = DeviceLost(f"{describe(error)}")
        lost.__cause__ = error
        with self._wake:
            self._lost, self._thread = lost, None
            for sequence in (*self.scheduler.running, *self.scheduler.waiting, *self._incoming):
                sequence.emit((sequence, lost))

    def _step(self) -> None:
        """Schedule, run, postprocess. Where the device computes by itself, what is postprocessed is the step before."""
        self._grow_again()
        launched = self._run(self._schedule())
        if self.runner.ahead:
            launched, self._in_flight = self._in_flight, launched
        for chunks, tokens in launched:
            self._postprocess(chunks, tokens)

    def _schedule(self) -> list[Chunk]:
        """Lets sequences in, and encodes the images that the next step needs."""
        self.scheduler.drop_cancelled()
        known = len(self.scheduler.running)
        for sequence in self.scheduler.admit():
            message = f"{sequence.reserve} tokens do not fit into a cache of {self.cache.capacity}"
            self._emit(sequence, RowError("oom", message))
        for sequence in self.scheduler.running[known:]:
            self._enter(sequence)
        for sequence in self.scheduler.running:
            self._take_prefix(sequence)
        chunks = self.scheduler.plan()
        self._encode([chunk.sequence for chunk in chunks if _needs_features(chunk)])
        return [chunk for chunk in chunks if chunk.sequence.reservation is not None]

    def _reserve(self, sequence: SequenceState) -> object:
        prefix_source = find_prefix_source(sequence, self.scheduler.running)
        if prefix_source is None:
            return self.cache.reserve(sequence.reserve)
        reservation = self.cache.reserve(sequence.reserve, prefix_source.reservation, shared_tokens(sequence))
        sequence.prefix_source = prefix_source if reservation is not None else None
        return reservation

    def _enter(self, sequence: SequenceState) -> None:
        expected = sum(layout.tokens for layout in sequence.request.layouts)
        if len(sequence.placeholders) != expected:
            message = f"the prompt has {len(sequence.placeholders)} placeholders for {expected} features"
            self._fail(sequence, RowError("prompt", message))
        elif not sequence.prompt_length:
            self._fail(sequence, RowError("prompt", "the prompt is empty"))

    def _take_prefix(self, sequence: SequenceState) -> None:
        prefix_source, tokens = sequence.prefix_source, shared_tokens(sequence)
        if prefix_source is None:
            return
        if prefix_source.reservation is None:  # it failed or was given up before: this one leads now
            sequence.prefix_source = find_prefix_source(sequence, self.scheduler.running)
        elif prefix_source.computed >= tokens:
            self.cache.copy_prefix(prefix_source.reservation, sequence.reservation, tokens)
            sequence.computed, sequence.prefix_source = tokens, None

    def _encode(self, sequences: Sequence[SequenceState]) -> None:
        """Image features for `sequences`."""

        def alone(sequence: SequenceState, error: Exception, shrunk: bool) -> None:
            if shrunk:
                self._encode([sequence])
            else:
                self._fail(sequence, row_error(error))

        if sequences:
            try_apart(sequences, self.runner.encode, self._recover(self._shrink_tiles), alone)

    def _run(self, chunks: Sequence[Chunk]) -> list[_Launched]:
        """Launches one step, in several where memory is short. It may be repeated over the same tokens, since it writes
        the same keys and values to the same places."""
        launched: list[_Launched] = []

        def attempt(some: Sequence[Chunk]) -> None:
            launched.append((some, self.runner.step(some)))

        def alone(chunk: Chunk, error: Exception, shrunk: bool) -> None:
            # Else the next step is smaller
            if not (shrunk and chunk.length > self.scheduler.limits.prefill_tokens):
                self._fail(chunk.sequence, row_error(error))

        if chunks:
            try_apart(chunks, attempt, self._recover(self._shrink_step), alone)
        for chunk in (chunk for some, _ in launched for chunk in some):
            chunk.sequence.computed = chunk.end
            if chunk.samples:
                chunk.sequence.pending += 1
                chunk.sequence.features = None
        return launched

    def _recover(self, shrink: Callable[[Sequence[Any]], bool]) -> Callable[[Sequence[Any], Exception], bool]:
        """For `try_apart`: raises where the device is lost; where memory ran out, less is computed at once."""

        def recover(items: Sequence[Any], error: Exception) -> bool:
            if is_fatal(error):
                raise error
            if not is_out_of_memory(error):
                return False
            self._clean = 0
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return shrink(items)

        return recover

    def _postprocess(self, chunks: Sequence[Chunk], tokens: Tokens | None) -> None:
        """Takes in what a step sampled, and lets finished sequences out. What was computed for one that had left by
        then is dropped."""
        if tokens is None:
            return
        token_ids, logprobs = tokens.result()
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        for row, sequence in enumerate(sampling):
            if sequence.reservation is None:
                continue
            sequence.pending -= 1
            sequence.generated.append(token_ids[row])
            if logprobs is not None:
                sequence.logprobs.append(logprobs[row])
            self._finish_if_done(sequence)

    def _finish_if_done(self, sequence: SequenceState) -> None:
        request, generated = sequence.request, sequence.generated
        try:  # text is a row's own matter: a tokenizer that chokes on it takes no other row with it
            if not self._stopper.finished(generated, request.sampling):
                return
            completion = complete(self.family, request, generated)
        except Exception as error:
            self._fail(sequence, row_error(error))
            return
        if request.sampling.logprobs:
            completion = replace(completion, logprobs=tuple(sequence.logprobs))
        self.scheduler.remove(sequence)
        sequence.emit((sequence, completion))

    def _fail(self, sequence: SequenceState, error: RowError) -> None:
        self.scheduler.remove(sequence)
        self._emit(sequence, error)

    def _emit(self, sequence: SequenceState, error: RowError) -> None:
        sequence.emit((sequence, Completion(sequence.request.key, (), None, "error", error)))

    def _shrink_tiles(self, sequences: Sequence[SequenceState]) -> bool:
        if self.runner.tiles <= 1 or sum(len(each.request.layouts) for each in sequences) <= 1:
            return False  # an image is encoded whole, however few go together
        self.runner.tiles //= 2
        log.warning("out of memory while encoding images: now %d tiles at once", self.runner.tiles)
        return True

    def _shrink_step(self, chunks: Sequence[Chunk]) -> bool:
        """After a step ran out of memory: fewer prompt tokens a step, then fewer sequences."""
        limits = self.scheduler.limits
        if (
            any(chunk.length > _SMALLEST_CHUNK for chunk in chunks)
            and limits.prefill_tokens > _SMALLEST_CHUNK
        ):
            limits = replace(limits, prefill_tokens=limits.prefill_tokens // 2)
        elif len(chunks) > 1:
            limits = replace(limits, sequences=max(1, min(limits.sequences, len(chunks)) // 2))
        else:
            return False
        log.warning("out of memory in a step of %d sequences: now %s", len(chunks), limits)
        self.scheduler.limits = limits
        return True

    def _grow_again(self) -> None:
        """After many steps without running out of memory: twice what is computed at once, up to what was at first."""
        limits, tiles = self.scheduler.limits, self.runner.tiles
        if (limits, tiles) == (self._most, self._most_tiles):
            return
        self._clean += 1
        if self._clean < self._patience:
            return
        self._clean, self._patience = 0, 2 * self._patience
        self.runner.tiles = min(self._most_tiles, 2 * tiles)
        self.scheduler.limits = replace(
            limits,
            sequences=min(self._most.sequences, 2 * limits.sequences),
            prefill_tokens=min(self._most.prefill_tokens, 2 * limits.prefill_tokens),
        )
        log.info(
            "no lack of memory for long: now %s, %d tiles at once", self.scheduler.limits, self.runner.tiles
        )


def _record(device: Device, runner: ModelRunner) -> EngineRecord:
    choices = {**device.choices, "graphs": runner.graphs}
    why = [f"{part}: {choice.why}" for part, choice in choices.items() if choice.why]
    model = runner.model
    if model.config.dtype == torch.float16 and model.dtype == torch.float32:  # load_model's doing
        why.append("dtype: a CPU has no fast path in float16, and float32 holds the same values")
    record = EngineRecord(
        engine="continuous",
        device=device.name,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        **{part: choice.path for part, choice in choices.items()},
        why=tuple(why),
    )
    paths = ", ".join(f"{part} {choice.path}" for part, choice in choices.items())
    log.info("continuous engine on %s, %s: %s", record.device, record.dtype, paths)
    return record


def _needs_features(chunk: Chunk) -> bool:
    return chunk.sequence.features is None and chunk.start < chunk.sequence.prefix
