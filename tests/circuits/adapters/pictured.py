"""A tiny LLaVA with its processor, and files of pairs that name pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.circuits.hybrids import PICTURED

MARK = "<image>"
WORDS = ["<pad>", "<s>", "<unk>", "what", "is", "this", "that", "a", "cat", "dog", "user", ":"]
TEMPLATE = (
    "{{ bos_token }} {% for each in messages %}{{ each.role }} : {% for part in each.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
)


def processor() -> LlavaProcessor:
    """Of pictures of 28 by 28 pixels, four tokens each; its tokenizer puts BOS in front."""
    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), PICTURED)), MARK]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=[MARK], **names)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    size = {"height": 28, "width": 28}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def draw(folder: Path, *names: str) -> list[Image.Image]:
    """Files of random pictures, and the pictures."""
    found = []
    for seed, name in enumerate(names):
        numbers = torch.randint(0, 256, (32, 40, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        found.append(Image.fromarray(numbers.numpy()))
        found[-1].save(folder / name)
    return found


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
