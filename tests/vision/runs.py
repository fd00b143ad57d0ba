"""Whole runs on tiny vision-language checkpoints: tokenizers, processors, images, configurations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_vision import IMAGE, PATCH, PIXELS, VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Gemma3Processor, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

WORDS = 190
MARKS = {"<image>": IMAGE, "<start_of_image>": 206, "<end_of_image>": 207}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}MARK {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token."""
    entries = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *(f"w{index}" for index in range(WORDS))]
    vocabulary = {entry: index for index, entry in enumerate(entries)} | MARKS
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=special,
    )


def make_processor(name: str) -> Any:
    """That of Llava or Gemma 3; others need torchvision."""
    size = {"height": PIXELS, "width": PIXELS}
    if name == "gemma3":
        images = Gemma3ImageProcessorPil(size=size)
        template = TEMPLATE.replace("MARK", "<start_of_image>")
        return Gemma3Processor(images, make_tokenizer(), chat_template=template, image_seq_length=4)
    images = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size)
    return LlavaProcessor(
        images,
        make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("MARK", "<image>"),
    )


def write_processor(name: str, folder: Path) -> None:
    """The processor's files, or for families that can't have one here the tokenizer's."""
    (make_processor(name) if name in ("llava", "gemma3") else make_tokenizer()).save_pretrained(folder)


def words(count: int, seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(WORDS)}" for _ in range(count))


def write_samples(folder: Path, count: int = 3) -> list[dict[str, Any]]:
    """Images of noise with questions of different lengths, as ``samples.json``; the last sample has no image."""
    folder.mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = []
    for number in range(count):
        pixels = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        entry = {"image": f"{number}.png", "question": words(6 + 3 * number, number), "answer": words(4, 100 + number)}
        entries.append(entry if number + 1 < count else {**entry, "image": ""})
    (folder / "samples.json").write_text(json.dumps(entries))
    return entries


def settings(checkpoint: Path, text: Path, save_path: Path | None, method: Any, **changes: Any) -> dict[str, Any]:
    """4 bits in groups of 32, calibrated with a text, not evaluated."""
    saved = {"save_vllm": True, "save_fake": True, "save_path": str(save_path)} if save_path is not None else {}
    content: dict[str, Any] = {
        "base": {"seed": 42, "device": "cpu"},
        "model": {"path": str(checkpoint), "torch_dtype": "float32"},
        "calib": {
            "name": "text",
            "path": str(text),
            "n_samples": 3,
            "bs": 1,
            "seq_len": 20,
            "preproc": "sequential",
        },
        "quant": {
            "method": method,
            "weight": {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 32},
        },
        "save": saved,
    }
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values}
    return content


def with_images(folder: Path, **changes: Any) -> dict[str, Any]:
    """The section ``calib`` for images; what it leaves out of the text's is named."""
    return {"name": "custom_mm", "path": str(folder), "preproc": None, "seq_len": 40, "add_answer": True, **changes}


def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of an image-text sample."""
    return model(**inputs, use_cache=False).logits[..., :VOCAB]
