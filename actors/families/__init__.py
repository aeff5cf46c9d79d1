"""The model families Tessera serves, and how a checkpoint finds its own.

Config.json's model_type names the family; a family's module is imported only when asked for.
"""

import importlib
from typing import TYPE_CHECKING

from actors.checkpoint_files import CheckpointError, HubError
from actors.families.base import Family, ImageLayout, PromptError
from actors.families.checkpoint import explained, read_checkpoint, read_model_type
from actors.families.messages import Message, text_message, user_message

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FAMILIES = {
    "aria": ("actors.families.aria", "Aria"),
    "aya_vision": ("actors.families.aya_vision", "AyaVision"),
    "fuyu": ("actors.families.fuyu", "Fuyu"),
    "llava_onevision": ("actors.families.llava_onevision", "LlavaOnevision"),
}
"""model_type -> (module, class)"""

__all__ = [
    "FAMILIES",
    "CheckpointError",
    "Family",
    "HubError",
    "ImageLayout",
    "Message",
    "PromptError",
    "load_family",
    "load_model",
    "text_message",
    "user_message",
]


def load_family(path: str, revision: str | None = None) -> Family:
    """The family of a checkpoint (local folder or hub id), without its weights. Raises CheckpointError."""
    model_type = read_model_type(path, revision)
    if model_type not in FAMILIES:
        served = ", ".join(FAMILIES)
        raise CheckpointError(f"{path}: model_type {model_type!r} is not served; Tessera serves {served}")
    module, name = FAMILIES[model_type]
    family: type[Family] = getattr(importlib.import_module(module), name)
    with explained(path, revision, "processor_config.json", "preprocessor_config.json"):
        return family(read_checkpoint(path, revision))


def load_model(
    path: str,
    revision: str | None = None,
    dtype: "str | torch.dtype" = "auto",
    device: "str | torch.device" = "cpu",
) -> "PreTrainedModel":
    """The checkpoint's stock model, in eval mode on `device`; `dtype` "auto" is the checkpoint's own. On a CPU, float16
    becomes float32, which holds the same values: no CPU path of ours or of torch's is quick in float16.

    Raises CheckpointError where the folder lacks some of the model's weights: stock would make them up.
    """
    from transformers import AutoModelForImageTextToText

    from actors.families.aria_experts import accept_sequential_experts

    with accept_sequential_experts():
        model, loading = AutoModelForImageTextToText.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            output_loading_info=True,
        )
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(f"{path}: {len(missing)} weights are missing, e.g. {missing[0]}")
    model.requires_grad_(False)
    if str(device) == "cpu" and str(model.dtype) == "torch.float16":
        model.float()
    moved: PreTrainedModel = model.to(device).eval()
    return moved
