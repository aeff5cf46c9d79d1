"""What one would write without Tessera: Ray Data around transformers' `generate`, in batches of eight.

The stock processor of LLaVA-OneVision needs torchvision; its Pillow image processor and its tokenizer do the same work,
and Tessera's arithmetic stands for the processor's count of placeholders.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from ray.data import ActorPoolStrategy
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from actors.families import load_family

BATCH = 8


class Captioner:
    def __init__(self, checkpoint: str, prompt: str, new_tokens: int) -> None:
        self.images = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.family = load_family(checkpoint)
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
        self.prompt, self.new_tokens = prompt, new_tokens

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in batch["image"]]
        inputs = self.images(images=pictures, return_tensors="pt")
        with torch.inference_mode():
            image = self.model.config.image_token_id
            turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.prompt}]}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            before, after = (self.tokenizer(part).input_ids for part in text.split("<image>"))
            count = self.family.layout([tuple(inputs["image_sizes"][0].tolist())])[0].tokens
            ids = torch.tensor([[*before, *[image] * count, *after]] * len(pictures))
            made = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=inputs["pixel_values"],
                image_sizes=inputs["image_sizes"],
                max_new_tokens=self.new_tokens,
                do_sample=False,
            )
        captions = self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        return {"id": batch["id"], "caption": captions}


def main(source: str, checkpoint: str, out: str, prompt: str, new_tokens: str) -> None:
    cores = int(ray.cluster_resources()["CPU"])
    rows = ray.data.read_parquet(source)
    arguments = (checkpoint, prompt, int(new_tokens))
    captions = rows.map_batches(
        Captioner,
        fn_constructor_args=arguments,
        batch_size=BATCH,
        num_cpus=max(1, cores - 1),
        compute=ActorPoolStrategy(size=1),
    )
    captions.write_parquet(out)


if __name__ == "__main__":
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    main(*sys.argv[1:])
