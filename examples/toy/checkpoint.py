"""Untrained toy checkpoints: real transformers classes, tokenizer, chat template and processor config.

A folder written here has the layout that transformers 5 saves, so whatever loads a hub
checkpoint loads a toy one. Geometry: tiles of 48 px in patches of 12, so that an object is about two patches
wide, which is what lets a model of a million parameters tell shapes. Aria takes one crop of 96 px, the larger
of its two sizes (the stock image processor insists on 490 or 980, Tessera's reads the config); Fuyu takes the
picture as it is.

Weights are bfloat16 on disk and float32 in use (`dtype` in config.json): half the bytes, exact parity tests.
"""

from __future__ import annotations

import json
import math
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
    PreTrainedTokenizerBase,
)

from examples.toy.vocabulary import CHAT_TEMPLATES, MAX_POSITIONS, build_tokenizer

TILE, PATCH = 48, 12
PINPOINTS = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE]]
ARIA_QUERIES = {48: 8, 96: 16}
"""Side of a crop in pixels -> its queries, the small analog of Aria's {490: 128, 980: 256}."""
ARIA_SIDE = 96
FUYU_SIZE = 120

ROPE = {"rope_type": "default", "rope_theta": 1000.0}
VISION = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": PATCH,
}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": TILE, "vision_use_head": False}
SIZE = {"height": TILE, "width": TILE}
BILINEAR, BICUBIC = 2, 3  # as Pillow counts them
PIXELS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_resize": True}
HALF = {**PIXELS, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

CLASSES: dict[str, type[PreTrainedModel]] = {
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
    "aya_vision": AyaVisionForConditionalGeneration,
    "aria": AriaForConditionalGeneration,
    "fuyu": FuyuForCausalLM,
}


def write_untrained(family: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Write a family's checkpoint with fresh weights into `folder`; returns the model, in float32."""
    tokenizer = build_tokenizer(family)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if family in CHAT_TEMPLATES:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES[family], encoding="utf-8")
    processor = json.dumps(processor_config(family), indent=2, sort_keys=True)
    (folder / "processor_config.json").write_text(processor + "\n", encoding="utf-8")
    torch.manual_seed(seed)
    model = build_model(family, tokenizer)
    save_weights(model, folder)
    return model


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json, generation_config.json and the weights rounded to bfloat16; `model` stays."""
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=rounded)


def build_model(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A family's stock model with fresh weights, in float32."""
    config = model_config(family, tokenizer)
    config.dtype = torch.float32
    model = CLASSES[family](config)
    if family == "aria":
        _prepare_queries(model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _prepare_queries(model: PreTrainedModel) -> None:
    """Let Aria's queries tell what is where.

    Stock starts them at zero: all alike, they could only learn alike. They also see patches in no order, so a
    place is known only by the tower's position embedding, whose stock start drowns in the pixels: the model
    then names both objects and guesses "left of" or "above". It starts with loud waves instead.
    """
    torch.nn.init.normal_(model.model.multi_modal_projector.query)
    table = model.model.vision_tower.embeddings.position_embedding.weight
    side = math.isqrt(table.shape[0])
    waves = torch.logspace(-1, 1, table.shape[1] // 4, base=4.0)  # a quarter to four of them across the image
    angles = 2 * math.pi * torch.arange(side)[:, None] / side * waves
    axis = 2 * torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    with torch.no_grad():
        table.copy_(torch.cat([rows, columns], dim=2).flatten(0, 1))


def model_config(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The family's config: about a million parameters."""
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": ROPE,
    }
    return CONFIGS[family](text, tokenizer)


def _llava_onevision_config(text: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    qwen2 = {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "intermediate_size": 288,
        "num_key_value_heads": 2,
    }
    return LlavaOnevisionConfig(
        text_config={**text, **qwen2},
        vision_config=SIGLIP,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )


def _aya_vision_config(text: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    # Three sliding layers, then one without positions that sees everything; prompts outgrow the window.
    cohere2 = {
        "model_type": "cohere2",
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "sliding_window_pattern": 4,
        "intermediate_size": 288,
        "num_key_value_heads": 2,
        "logit_scale": 1.0,
    }
    return AyaVisionConfig(
        text_config={**text, **cohere2},
        vision_config=SIGLIP,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )


def _aria_config(text: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 128}
    return AriaConfig(
        text_config={**text, **experts, "model_type": "aria_text", "num_hidden_layers": 3},
        vision_config={**VISION, "model_type": "idefics3_vision", "image_size": ARIA_SIDE},
        image_token_index=tokenizer.convert_tokens_to_ids("<|img|>"),
        projector_patch_to_query_dict={(side // PATCH) ** 2: n for side, n in ARIA_QUERIES.items()},
    )


def _fuyu_config(text: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    persimmon = {
        "model_type": "persimmon",
        "num_hidden_layers": 4,
        "intermediate_size": 512,
        "qk_layernorm": True,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    }
    return FuyuConfig(
        text_config={**text, **persimmon},
        hidden_size=text["hidden_size"],  # as released checkpoints have it: older transformers reads it
        patch_size=PATCH,
        image_size=FUYU_SIZE,
        image_token_id=tokenizer.convert_tokens_to_ids("|SPEAKER|"),
    )


CONFIGS = {
    "llava_onevision": _llava_onevision_config,
    "aya_vision": _aya_vision_config,
    "aria": _aria_config,
    "fuyu": _fuyu_config,
}


def processor_config(family: str) -> dict[str, Any]:
    """`processor_config.json`: the processor's own fields and, nested, the image processor's."""
    return PROCESSORS[family]()


def _llava_onevision_processor() -> dict[str, Any]:
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": SIZE, "resample": BICUBIC}
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "image_processor": {
            **HALF,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": SIZE,
            "image_grid_pinpoints": PINPOINTS,
            "resample": BICUBIC,
            "do_pad": True,
        },
        "video_processor": {**HALF, **video},
        "num_image_tokens": (TILE // PATCH) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "image_token": "<image>",
        "video_token": "<video>",
    }


def _aya_vision_processor() -> dict[str, Any]:
    return {
        "processor_class": "AyaVisionProcessor",
        "image_processor": {
            **HALF,
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": SIZE,
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 2,
            "resample": BICUBIC,
        },
        "patch_size": PATCH,
        "img_size": TILE,
        "downsample_factor": 2,
    }


def _aria_processor() -> dict[str, Any]:
    return {
        "processor_class": "AriaProcessor",
        "image_processor": {
            **HALF,
            "image_processor_type": "AriaImageProcessor",
            "max_image_size": ARIA_SIDE,
            "min_image_size": 64,
            "split_image": False,
            "split_resolutions": [[ARIA_SIDE * h, ARIA_SIDE * w] for h, w in ((1, 2), (2, 2), (2, 1))],
            "resample": BICUBIC,
        },
        "size_conversion": {str(side): queries for side, queries in ARIA_QUERIES.items()},
    }


def _fuyu_processor() -> dict[str, Any]:
    return {
        "processor_class": "FuyuProcessor",
        "image_processor": {
            **PIXELS,
            "image_processor_type": "FuyuImageProcessor",
            "image_mean": 0.5,
            "image_std": 0.5,
            "size": {"height": FUYU_SIZE, "width": FUYU_SIZE},
            "patch_size": {"height": PATCH, "width": PATCH},
            "do_pad": True,
            "padding_value": 1.0,
            "padding_mode": "constant",
            "resample": BILINEAR,
        },
    }


PROCESSORS = {
    "llava_onevision": _llava_onevision_processor,
    "aya_vision": _aya_vision_processor,
    "aria": _aria_processor,
    "fuyu": _fuyu_processor,
}
