"""One step of the model: embed what enters, run the packed tokens, pick the next ones.

Text ids, image features and decoding tokens become one [1, N, D] input; only the rows that yield a
token reach the output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine.checkpoint_rules import CheckpointRules
from actors.engine.devices.base import Device, Step
from actors.engine.devices.cuda.cache import PagedCache
from actors.engine.devices.cuda.graphs import DecodeGraphs, capture_decoding
from actors.engine.devices.proof import Choice
from actors.engine.model.packed import Pass, packed_forward
from actors.engine.sampling import Sampler, Tokens
from actors.engine.scheduler import Chunk, SequenceState
from actors.engine.transfer import upload
from actors.families.base import Family, ImageLayout


@dataclass(frozen=True, slots=True)
class _Image:
    pixels: np.ndarray
    layout: ImageLayout


class ModelRunner:
    """The model of one family over one cache. Calls are to be made in inference mode, by one thread at a time."""

    def __init__(
        self, family: Family, model: PreTrainedModel, device: Device, rules: CheckpointRules
    ) -> None:
        self.family, self.model, self.cache = family, model, device.cache
        self.device = model.device
        self.ahead = model.device.type == "cuda"
        """Whether a step is to begin before the tokens of the one before it are known."""
        self.tiles = device.tiles
        """Tiles encoded at once; a larger image is encoded alone."""
        self._embed = model.get_input_embeddings()
        self._sampler = Sampler(device.limits.sequences, rules, model.device)
        self._graphs: DecodeGraphs | None = None
        self.graphs = Choice("none")
        """Whether decoding steps are CUDA graphs."""
        if isinstance(device.cache, PagedCache) and device.cache.attention != "gathered":
            self._sampler.last.random_(to=self._embed.num_embeddings)
            with torch.inference_mode():
                self._graphs, self.graphs = capture_decoding(
                    device.cache, self._decode, device.limits.sequences, family.max_positions
                )

    def encode(self, sequences: Sequence[SequenceState]) -> None:
        """Sets the image features of sequences, micro-batched across rows: a small image does not run alone."""
        images = [image for sequence in sequences for image in _images(sequence)]
        features: list[Tensor] = []
        batch: list[_Image] = []
        for image in images:
            if batch and sum(each.layout.tiles for each in batch) + image.layout.tiles > self.tiles:
                features += self._encode(batch)
                batch = []
            batch.append(image)
        if batch:
            features += self._encode(batch)
        left = iter(features)
        for sequence in sequences:
            own = [next(left) for _ in sequence.request.layouts]
            sequence.features = torch.cat(own) if len(own) > 1 else own[0]

    def step(self, chunks: Sequence[Chunk]) -> Tokens | None:
        """Computes `chunks` (those of one token first); one token for each chunk that samples, in order."""
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        logits = None
        if self._graphs is not None and all(chunk.start >= chunk.sequence.prompt_length for chunk in chunks):
            logits = self._graphs(chunks)
        if logits is None:
            logits = self._packed(chunks, len(sampling))
        return self._sampler(logits, sampling) if sampling else None

    def _packed(self, chunks: Sequence[Chunk], sampling: int) -> Tensor:
        """Logits [sampling, V] of the chunks that sample."""
        bounds = list(accumulate((chunk.length for chunk in chunks), initial=0))
        ids = np.concatenate([_token_ids(chunk) for chunk in chunks])
        embeds = self._embed(self._with_last(self._upload(self._padded(ids)), chunks))
        self._place_features(embeds, chunks, bounds)
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        hidden = packed_forward(
            self.model,
            embeds[None],
            self._upload(self._padded(positions))[None],
            self._pass(chunks, bounds),
        )
        logits: Tensor = self.model.lm_head(hidden[: self.cache.bucket(sampling)])[:sampling]
        return logits

    def _with_last(self, ids: Tensor, chunks: Sequence[Chunk]) -> Tensor:
        """`ids` with the last tokens of decoding sequences, which are on the device."""
        decoding = [
            (at, chunk.sequence.slot)
            for at, chunk in enumerate(chunks)
            if chunk.start >= chunk.sequence.prompt_length
        ]
        if decoding:
            at, slots = self._upload(np.array(decoding).T.copy())
            ids.index_copy_(0, at, self._sampler.last[slots])
        return ids

    def _decode(self, slots: Tensor, positions: Tensor, step: Step) -> Tensor:
        """A step of decoding tokens alone: the sequences' slots [B], positions [B] -> logits [B, V]."""
        ids = self._sampler.last[slots]
        logits: Tensor = self.model.lm_head(
            packed_forward(self.model, self._embed(ids)[None], positions[None], Pass(step))
        )
        return logits

    def _pass(self, chunks: Sequence[Chunk], bounds: Sequence[int]) -> Pass:
        step = self.cache.step(chunks)
        rows = [end - 1 for chunk, end in zip(chunks, bounds[1:], strict=True) if chunk.samples]
        if len(rows) == bounds[-1]:
            return Pass(step)
        last = [Chunk(chunk.sequence, chunk.end - 1, 1) for chunk in chunks if chunk.samples]
        padded = self._padded(np.array(rows, np.int64))
        return Pass(step, self._upload(padded), self.cache.step(last) if last else None)

    def _encode(self, images: Sequence[_Image]) -> list[Tensor]:
        pixels = np.concatenate([image.pixels for image in images])
        layouts = [image.layout for image in images]
        return self.family.embed_images(self.model, self._upload(pixels), layouts)

    def _place_features(self, embeds: Tensor, chunks: Sequence[Chunk], bounds: Sequence[int]) -> None:
        """Writes image features over the embeddings of their placeholders, in place."""
        for chunk, begin in zip(chunks, bounds, strict=False):
            features = chunk.sequence.features
            if features is None:
                continue
            places = chunk.sequence.placeholders
            first, last = np.searchsorted(places, (chunk.start, chunk.end))
            if first < last:
                rows = self._upload(places[first:last] - chunk.start + begin)
                embeds[rows] = features[first:last].to(embeds.dtype)

    def _padded(self, values: np.ndarray) -> np.ndarray:
        """`values` and as many zeros behind as a step's tokens, or rows, are padded by."""
        return np.pad(values, (0, self.cache.bucket(len(values)) - len(values)))

    def _upload(self, values: np.ndarray) -> Tensor:
        return upload(values, self.device)


def _token_ids(chunk: Chunk) -> np.ndarray:
    """int64 ids of a chunk of the prompt; 0 for a token that was sampled."""
    ids = chunk.sequence.request.token_ids[chunk.start : chunk.end].astype(np.int64)
    return ids if len(ids) else np.zeros(1, np.int64)


def _images(sequence: SequenceState) -> list[_Image]:
    request = sequence.request
    bounds = accumulate((layout.tiles for layout in request.layouts), initial=0)
    return [
        _Image(request.pixels[begin:end], layout)
        for (begin, end), layout in zip(pairwise(bounds), request.layouts, strict=True)
    ]
