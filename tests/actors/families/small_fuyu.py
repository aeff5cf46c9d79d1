"""Fuyu at real geometry and tiny width, with a tokenizer that behaves like the real one."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import (
    FuyuConfig,
    FuyuForCausalLM,
    FuyuImageProcessor,
    FuyuProcessor,
    PreTrainedTokenizerFast,
)

from tests.actors.families.small import Parts

SPECIAL = ("<unk>", "<s>", "|ENDOFTEXT|")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def fuyu() -> Parts:
    tokenizer = unigram_tokenizer()
    config = FuyuConfig(
        text_config={
            "model_type": "persimmon",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16384,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.5,
        },
        hidden_size=16,
        image_token_id=tokenizer.convert_tokens_to_ids("|SPEAKER|"),
    )
    processor = FuyuProcessor(FuyuImageProcessor(), tokenizer)
    processor.images_kwargs = {"do_convert_rgb": True}  # stock knows no other mode than RGB
    return FuyuForCausalLM, config, processor


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece makes them: a dummy prefix piece, markers as plain pieces, BOS added by default."""
    pieces = [(piece, 0.0) for piece in (*SPECIAL, *BYTES, "|SPEAKER|", "|NEWLINE|")]
    pieces += [("▁", -3.0), ("▁the", -4.0)] + [(chr(code), -5.0) for code in range(33, 127)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    unigram.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    unigram.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    unigram.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    unigram.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=unigram, bos_token="<s>", eos_token="|ENDOFTEXT|", unk_token="<unk>"
    )
