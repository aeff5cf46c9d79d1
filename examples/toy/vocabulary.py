"""Word-level tokenizers for the toy checkpoints, with each family's real special tokens and chat format.

A vocabulary is every word that a scene's captions and prompts can hold, behind the special
tokens that the family's processor and chat template know by name.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from examples.toy.scenes import PROMPTS, caption, random_scene

CHATML_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] }}
{%- if message['content'] is string %}{{- '\\n' + message['content'] }}
{%- else %}
{%- for part in message['content'] if part['type'] == 'image' %}{{- IMAGE }}{% endfor %}
VIDEOS{%- for part in message['content'] if part['type'] == 'text' %}{{- '\\n' + part['text'] }}{% endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

AYA_TEMPLATE = """\
{{- bos_token }}
{%- set roles = {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'} %}
{%- for message in messages %}
{{- '<|START_OF_TURN_TOKEN|>' + roles[message['role']] }}
{%- if message['role'] == 'assistant' %}{{- '<|START_RESPONSE|>' }}{% endif %}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<image>' }}{% endif %}
{%- if part['type'] == 'text' %}{{- part['text'] }}{% endif %}
{%- endfor %}
{%- endif %}
{%- if message['role'] == 'assistant' %}{{- '<|END_RESPONSE|>' }}{% endif %}
{{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' }}
{%- endif %}
"""

VIDEOS = "{%- for part in message['content'] if part['type'] == 'video' %}{{- '<video>' }}{% endfor %}\n"

CHAT_TEMPLATES = {
    "llava_onevision": CHATML_TEMPLATE.replace("IMAGE", "'<image>'").replace("VIDEOS", VIDEOS),
    "aya_vision": AYA_TEMPLATE,
    "aria": CHATML_TEMPLATE.replace("IMAGE", "'<fim_prefix><|img|><fim_suffix>'").replace("VIDEOS", ""),
}
"""Fuyu has none: its prompt is the text itself."""

LANGUAGES = {"llava_onevision": ("en",), "aya_vision": ("en", "es", "fr"), "aria": ("en",), "fuyu": ("en",)}
"""What each toy is taught; the prompt's language decides."""

MAX_POSITIONS = 2048


def words(languages: tuple[str, ...]) -> list[str]:
    """Every word of the captions and prompts of `languages`, sorted."""
    found = {word for language in languages for word in PROMPTS[language].split()}
    for seed in range(3000):
        scene = random_scene(seed)
        found.update(word for language in languages for word in caption(scene, language).split())
    return sorted(found)


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The toy tokenizer of a family (a config's model_type)."""
    return TOKENIZERS[family](words(LANGUAGES[family]))


def _llava_onevision_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    core = _word_level([*special, "<unk>", "user", "assistant", "system", *vocabulary])
    return _fast(core, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _aria_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|img|>"]
    special += ["<fim_prefix>", "<fim_suffix>"]
    core = _word_level([*special, "user", "assistant", "system", *vocabulary])
    return _fast(
        core, special, bos_token="<s>", eos_token="<|im_end|>", pad_token="<unk>", image_token="<|img|>"
    )


def _aya_vision_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    turns = ["START_OF_TURN_TOKEN", "END_OF_TURN_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN", "SYSTEM_TOKEN"]
    answer = ["START_RESPONSE", "END_RESPONSE"]
    image = ["START_OF_IMG", "END_OF_IMG", "IMG_PATCH", "IMG_LINE_BREAK"]
    tiles = ["TILE_GLOBAL", *(f"TILE_{index}" for index in range(1, 13))]
    named = [f"<|{name}|>" for name in [*turns, *answer, *image]]
    special = ["<PAD>", "<UNK>", "<BOS_TOKEN>", *named, "<image>", *tiles]
    core = _word_level([*special, *vocabulary], unk="<UNK>")
    core.post_processor = processors.TemplateProcessing(
        single="<BOS_TOKEN> $A", special_tokens=[("<BOS_TOKEN>", special.index("<BOS_TOKEN>"))]
    )
    return _fast(
        core,
        special,
        bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
        unk_token="<UNK>",
    )


def _fuyu_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """SentencePiece's habits in small: a space is "▁", and a text gets one in front."""
    special = ["<unk>", "<s>", "|ENDOFTEXT|"]
    pieces = ["|SPEAKER|", "|NEWLINE|", "<0x00>", "<0x01>", "<0x02>", "<0x03>", "<0x04>", "▁"]
    core = _word_level([*special, *pieces, *(f"▁{word}" for word in vocabulary)])
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pattern = r"\|SPEAKER\||\|NEWLINE\||<0x0[0-4]>|▁?[^▁|<]+|▁|[|<]"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
    )
    return _fast(core, special, bos_token="<s>", eos_token="|ENDOFTEXT|", pad_token="|ENDOFTEXT|")


def _word_level(vocabulary: list[str], unk: str = "<unk>") -> Tokenizer:
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=unk))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


def _fast(
    core: Tokenizer,
    special: list[str],
    *,
    eos_token: str,
    pad_token: str,
    bos_token: str | None = None,
    unk_token: str = "<unk>",
    image_token: str | None = None,
) -> PreTrainedTokenizerFast:
    core.add_special_tokens(special)
    optional: dict[str, Any] = {"bos_token": bos_token} if bos_token else {}
    if image_token:
        optional["extra_special_tokens"] = {"image_token": image_token}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos_token,
        pad_token=pad_token,
        unk_token=unk_token,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        **optional,
    )


TOKENIZERS = {
    "llava_onevision": _llava_onevision_tokenizer,
    "aria": _aria_tokenizer,
    "aya_vision": _aya_vision_tokenizer,
    "fuyu": _fuyu_tokenizer,
}
