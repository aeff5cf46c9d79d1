"""Random-weight models of the real architectures, for benchmarks: real cost without the weights.

A size is a table of layer shapes. `mini` is small enough for two CPU cores and large enough that matrix
products dominate; `0.5b` and `7b` have the layer shapes of the named checkpoints. Tokenizers are the toys': words do
not matter here, since every row generates a given number of tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    FuyuConfig,
    FuyuForCausalLM,
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from actors.families import Family, load_family
from examples.toy.vocabulary import CHAT_TEMPLATES, build_tokenizer

CLASSES: dict[str, type[PreTrainedModel]] = {
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
    "aya_vision": AyaVisionForConditionalGeneration,
    "aria": AriaForConditionalGeneration,
    "fuyu": FuyuForCausalLM,
}

TEXT_CLASSES = {
    "llava_onevision": "Qwen2ForCausalLM",
    "aya_vision": "Cohere2ForCausalLM",
    "aria": "AriaTextForCausalLM",
    "fuyu": "PersimmonForCausalLM",
}

# hidden, intermediate, layers, heads, key-value heads, vocabulary
TEXT: dict[tuple[str, str], tuple[int, int, int, int, int, int]] = {
    ("toy", "llava_onevision"): (128, 352, 2, 4, 2, 512),
    ("toy", "aya_vision"): (128, 352, 4, 4, 2, 512),
    ("toy", "aria"): (128, 64, 2, 4, 4, 512),
    ("toy", "fuyu"): (128, 512, 2, 4, 4, 512),
    ("mini", "llava_onevision"): (512, 1408, 8, 8, 2, 32000),
    ("mini", "aya_vision"): (512, 1408, 8, 8, 2, 32000),
    ("mini", "aria"): (512, 256, 8, 8, 8, 32000),
    ("mini", "fuyu"): (512, 2048, 8, 8, 8, 32000),
    ("0.5b", "llava_onevision"): (896, 4864, 24, 14, 2, 151936),
    ("7b", "llava_onevision"): (3584, 18944, 28, 28, 4, 152064),
    ("7b", "aya_vision"): (4096, 14336, 32, 32, 8, 256000),
    ("7b", "aria"): (2560, 1664, 28, 20, 20, 100352),
    ("7b", "fuyu"): (4096, 16384, 36, 64, 64, 262144),
}
# hidden, intermediate, layers, heads
VISION: dict[str, tuple[int, int, int, int]] = {
    "toy": (64, 128, 1, 2),
    "mini": (384, 1536, 6, 6),
    "0.5b": (1152, 4304, 26, 16),
    "7b": (1152, 4304, 26, 16),
}
# experts, of them active, shared
EXPERTS = {"toy": (4, 2, 1), "mini": (16, 4, 2), "7b": (64, 6, 2)}
SIDES = {  # tile side in pixels of small and real sizes
    "llava_onevision": (224, 384),
    "aya_vision": (224, 364),
    "aria": (490, 980),
}
PATCH = 14
PINPOINTS = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]
"""Grids of LLaVA-OneVision, in tiles."""


def sizes_of(family: str) -> list[str]:
    return [size for size, name in TEXT if name == family]


def tile_side(family: str, size: str) -> int:
    return SIDES[family][size not in ("toy", "mini")]


def build(
    family: str, size: str, folder: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Family, PreTrainedModel]:
    """A checkpoint folder without weights, its family, and a model of fresh weights, the same each time."""
    tokenizer = build_tokenizer(family)
    config = model_config(family, size, tokenizer.get_vocab())
    config.dtype = dtype
    config.architectures = [CLASSES[family].__name__]  # as saved checkpoints name them; vLLM asks
    config.get_text_config().architectures = [TEXT_CLASSES[family]]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    if family in CHAT_TEMPLATES:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES[family])
    (folder / "processor_config.json").write_text(json.dumps(processor_config(family, size)))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a 25B model must not be made in float32 first
    try:
        with device:
            model = CLASSES[family](config)
    finally:
        torch.set_default_dtype(before)
    # Nothing ends a row but its length: the cost of a row is then the same in every system.
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    loaded = load_family(str(folder))
    loaded.eos_token_ids = frozenset()
    return loaded, model.requires_grad_(False).eval()


def model_config(family: str, size: str, ids: dict[str, int]) -> PreTrainedConfig:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = TEXT[size, family]
    text: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "head_dim": hidden // heads,
        **{f"{name}_token_id": 0 for name in ("bos", "eos", "pad")},
    }
    return _CONFIGS[family](text, size, ids)


def _llava_onevision_config(text: dict[str, Any], size: str, ids: dict[str, int]) -> PreTrainedConfig:
    side = tile_side("llava_onevision", size)
    return LlavaOnevisionConfig(
        text_config={**text, "model_type": "qwen2"},
        vision_config=_vision("llava_onevision", size),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[side * rows, side * columns] for rows, columns in PINPOINTS],
        tie_word_embeddings=size == "0.5b",
    )


def _aya_vision_config(text: dict[str, Any], size: str, ids: dict[str, int]) -> PreTrainedConfig:
    return AyaVisionConfig(
        text_config={**text, "model_type": "cohere2", "sliding_window": 4096 if size == "7b" else 512},
        vision_config=_vision("aya_vision", size),
        image_token_index=ids["<|IMG_PATCH|>"],
        alignment_intermediate_size=36864 if size == "7b" else 4 * text["hidden_size"],
    )


def _aria_config(text: dict[str, Any], size: str, ids: dict[str, int]) -> PreTrainedConfig:
    experts, active, shared = EXPERTS[size]
    mixture = {"moe_num_experts": experts, "moe_topk": active, "moe_num_shared_experts": shared}
    return AriaConfig(
        text_config={**text, **mixture, "model_type": "aria_text"},
        vision_config={**_vision("aria", size), "model_type": "idefics3_vision"},
        image_token_index=ids["<|img|>"],
        projector_patch_to_query_dict={(tile_side("aria", size) // PATCH) ** 2: 256},
    )


def _fuyu_config(text: dict[str, Any], size: str, ids: dict[str, int]) -> PreTrainedConfig:
    text = {name: value for name, value in text.items() if name not in ("num_key_value_heads", "head_dim")}
    return FuyuConfig(
        text_config={**text, "model_type": "persimmon", "qk_layernorm": True},
        hidden_size=text["hidden_size"],  # as released checkpoints have it: older transformers reads it
        patch_size=30,
        image_size=300,
        image_token_id=ids["|SPEAKER|"],
    )


def _vision(family: str, size: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads = VISION[size]
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": tile_side(family, size),
        "patch_size": PATCH,
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
    }


_CONFIGS = {
    "llava_onevision": _llava_onevision_config,
    "aya_vision": _aya_vision_config,
    "aria": _aria_config,
    "fuyu": _fuyu_config,
}


def processor_config(family: str, size: str) -> dict[str, Any]:
    """`processor_config.json`, as transformers 5 saves it."""
    return _PROCESSORS[family](size)


def _llava_onevision_processor(size: str) -> dict[str, Any]:
    side = tile_side("llava_onevision", size)
    image = _image("LlavaOnevisionImageProcessor", side)
    image["image_grid_pinpoints"] = [[side * rows, side * columns] for rows, columns in PINPOINTS]
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "image_processor": image,
        "video_processor": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": image["size"],
        },
        "num_image_tokens": (side // PATCH) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }


def _aya_vision_processor(size: str) -> dict[str, Any]:
    side = tile_side("aya_vision", size)
    return {
        "processor_class": "AyaVisionProcessor",
        "image_processor": {**_image("GotOcr2ImageProcessor", side), "min_patches": 1, "max_patches": 12},
        "patch_size": PATCH,
        "img_size": side,
        "downsample_factor": 2,
    }


def _aria_processor(size: str) -> dict[str, Any]:
    side = tile_side("aria", size)
    image = {**_image("AriaImageProcessor", side), "max_image_size": side, "split_image": False}
    return {"processor_class": "AriaProcessor", "image_processor": image, "size_conversion": {str(side): 256}}


def _fuyu_processor(size: str) -> dict[str, Any]:
    image = {
        "image_processor_type": "FuyuImageProcessor",
        "size": {"height": 1080, "width": 1920},
        "patch_size": {"height": 30, "width": 30},
    }
    return {"processor_class": "FuyuProcessor", "image_processor": image}


def _image(kind: str, side: int) -> dict[str, Any]:
    return {
        "image_processor_type": kind,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_rescale": True,
        "resample": 3,
        "size": {"height": side, "width": side},
    }


_PROCESSORS = {
    "llava_onevision": _llava_onevision_processor,
    "aya_vision": _aya_vision_processor,
    "aria": _aria_processor,
    "fuyu": _fuyu_processor,
}
