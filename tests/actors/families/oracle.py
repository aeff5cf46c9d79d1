"""The stock torchvision-backend processors as the oracle of the families.

Everything is built on the spot from real classes with real geometry: a byte-level tokenizer that knows the
family's special tokens, the stock processor at its defaults, and a model that is small in all but its tiles.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

from actors.families import Family, ImageLayout

pytest.importorskip("torchvision", reason="torchvision is the oracle of the image tests")


def byte_level_tokenizer(
    special: Sequence[str], eos: str, bos: str | None = None, **kwargs: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges and the tokens `special`; `bos` is put in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("T", "I"),
        ("L", "E"),
        ("TI", "LE"),
        ("Ġ", "t"),
        ("h", "e"),
        ("Ġt", "he"),
        ("i", "m"),
        ("Ġ", "a"),
    ]
    tokens = [*alphabet, *("".join(merge) for merge in merges)]
    bpe = models.BPE({token: index for index, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, bos_token=bos, **kwargs
    )


def write_checkpoint(
    folder: Path, config: PreTrainedConfig, processor: ProcessorMixin, layout: Literal["4.x", "5.x"] = "5.x"
) -> str:
    """Everything of a checkpoint but its weights, in the file layout of transformers 4.x or 5.x."""
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    if layout == "4.x":
        path = folder / "processor_config.json"
        saved = json.loads(path.read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(saved.pop("image_processor")))
        saved.pop("video_processor", None)
        path.write_text(json.dumps(saved))
        template = folder / "chat_template.jinja"
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
        template.unlink()
    return str(folder)


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """A random uint8 [3, height, width] image: noise shows every difference of a resize."""
    generator = torch.Generator().manual_seed(seed + 7919 * height + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def stock_row(
    processor: ProcessorMixin,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Tensor],
    videos: Sequence[Sequence[Tensor]] = (),
) -> dict[str, Tensor]:
    """What the stock processor makes of one row: the pictures fill the messages' slots in order."""
    left: dict[str, Iterator[Any]] = {
        "image": iter([pil(image) for image in images]),
        "video": iter([[pil(frame) for frame in video] for video in videos]),
    }
    filled = [
        {
            **message,
            "content": [
                {"type": part["type"], part["type"]: next(left[part["type"]])}
                if part["type"] in left
                else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    return dict(
        processor.apply_chat_template(
            filled, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def lay_out(
    family: Family, images: Sequence[Tensor], videos: Sequence[Sequence[Tensor]] = ()
) -> tuple[tuple[ImageLayout, ...], Tensor]:
    """Layouts and uint8 pixels `[sum of tiles, *tile_shape]` of one row, images before videos."""
    sizes: list[Any] = [(image.shape[1], image.shape[2]) for image in images]
    sizes += [(len(video), *video[0].shape[1:]) for video in videos]
    layouts = family.row_layouts(sizes)
    tiles = [family.tile(image, layout) for image, layout in zip(images, layouts, strict=False)]
    tiles += [torch.stack([family.tile_frame(frame) for frame in video]) for video in videos]
    for tile, layout in zip(tiles, layouts, strict=True):
        assert tile.dtype == torch.uint8
        assert tuple(tile.shape) == (layout.tiles, *family.tile_shape)
    return layouts, torch.cat(tiles) if tiles else torch.empty((0, *family.tile_shape), dtype=torch.uint8)


def assert_equals_stock(
    family: Family,
    processor: ProcessorMixin,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Tensor],
    videos: Sequence[Sequence[Tensor]] = (),
) -> tuple[tuple[ImageLayout, ...], Tensor]:
    """The law: ids, pixel floats and every other model input equal the stock processor's, bit for bit."""
    expected = stock_row(processor, messages, images, videos)
    layouts, pixels = lay_out(family, images, videos)

    ids = family.prompt(messages, layouts)
    assert ids.dtype == np.int32
    assert ids.tolist() == expected["input_ids"][0].tolist()
    assert len(family.placeholders(ids)) == sum(layout.tokens for layout in layouts)

    inputs = family.model_inputs(pixels, layouts) if layouts else {}
    text_only = {"input_ids", "attention_mask"}
    assert inputs.keys() == expected.keys() - text_only
    for name, value in inputs.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
    return layouts, pixels
