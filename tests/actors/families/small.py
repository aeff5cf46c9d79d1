"""Model config, model class and stock processor of each family, at real geometry and tiny width."""

from typing import Any

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    GotOcr2ImageProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)

from tests.actors.families.oracle import byte_level_tokenizer

Parts = tuple[type[Any], PreTrainedConfig, ProcessorMixin]

QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
COHERE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + message['role'].upper() + '_TOKEN|>' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|ASSISTANT_TOKEN|>' }}{% endif %}"
)


def siglip(image_size: int, patch_size: int) -> dict[str, Any]:
    """A SigLIP tower of the real geometry and one narrow layer."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": image_size,
        "patch_size": patch_size,
        "vision_use_head": False,
    }


def text(model_type: str, vocab_size: int, eos_token_id: int) -> dict[str, Any]:
    """A decoder of one narrow layer."""
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
    }


def llava_onevision() -> Parts:
    tokenizer = byte_level_tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"], eos="<|im_end|>")
    config = LlavaOnevisionConfig(
        vision_config=siglip(384, 14),
        text_config=text("qwen2", len(tokenizer), tokenizer.eos_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(),
        tokenizer,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        chat_template=QWEN_TEMPLATE,
    )
    return LlavaOnevisionForConditionalGeneration, config, processor


def aya_vision() -> Parts:
    turns = ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|ASSISTANT_TOKEN|>"]
    image = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    special = ["<BOS_TOKEN>", "<|SYSTEM_TOKEN|>", *turns, *image, "TILE_GLOBAL"]
    tokenizer = byte_level_tokenizer(special, eos="<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>")
    config = AyaVisionConfig(
        vision_config=siglip(364, 14),
        text_config={
            **text("cohere2", len(tokenizer), tokenizer.eos_token_id),
            "bos_token_id": tokenizer.bos_token_id,
            "sliding_window": 64,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        alignment_intermediate_size=8,
    )
    processor = AyaVisionProcessor(
        GotOcr2ImageProcessor(size={"height": 364, "width": 364}),
        tokenizer,
        patch_size=14,
        downsample_factor=2,
        chat_template=COHERE_TEMPLATE,
    )
    return AyaVisionForConditionalGeneration, config, processor
