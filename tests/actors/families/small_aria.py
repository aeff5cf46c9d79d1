"""Aria at real geometry and tiny width: real patches, queries and chat template."""

from transformers import AriaConfig, AriaForConditionalGeneration, AriaImageProcessor, AriaProcessor

from tests.actors.families.oracle import byte_level_tokenizer
from tests.actors.families.small import Parts

SPECIAL = ["<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>", "<|img|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}{{ item['text'] }}"
    "{% elif item['type'] == 'image' %}<fim_prefix><|img|><fim_suffix>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def aria(max_image_size: int = 980, split_image: bool = False) -> Parts:
    """Twelve experts, so that their names do not sort as their numbers do."""
    special_tokens = {"image_token": "<|img|>"}
    tokenizer = byte_level_tokenizer(SPECIAL, eos="<|im_end|>", extra_special_tokens=special_tokens)
    config = AriaConfig(
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 980,
            "patch_size": 14,
        },
        text_config={
            "model_type": "aria_text",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "moe_num_experts": 12,
            "max_position_embeddings": 16384,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
            "initializer_range": 0.5,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|img|>"),
    )
    images = {"max_image_size": max_image_size, "split_image": split_image}
    processor = AriaProcessor(AriaImageProcessor(**images), tokenizer, chat_template=CHAT_TEMPLATE)
    # The stock processor's own defaults would win over its image processor's configuration.
    processor.images_kwargs = images
    return AriaForConditionalGeneration, config, processor
