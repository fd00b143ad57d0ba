"""What end-to-end tests share: runs, digests of folders, text, a tokenizer."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import llmc

WORDS = 190  # the tiny vocabulary holds some more
WINDOW, WINDOWS = 24, 3


def write_tokenizer(folder: Path) -> None:
    """One word, one token; for Qwen2, whose class makes a byte-level BPE of any vocabulary, one letter."""
    entries = ["<s>", "<unk>", *(f"w{index}" for index in range(WORDS)), "w", "Ġ", *"0123456789"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)


def write_pieces(folder: Path) -> None:
    """A SentencePiece BPE of the same words, for formats that want one."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    model = schema.ModelProto()
    model.trainer_spec.model_type = schema.TrainerSpec.BPE
    kinds = schema.ModelProto.SentencePiece
    for index in range(WORDS + 2):
        kind = {0: kinds.UNKNOWN, 1: kinds.CONTROL}.get(index, kinds.NORMAL)
        model.pieces.add(piece={0: "<unk>", 1: "<s>"}.get(index, f"▁w{index - 2}"), score=-float(index), type=kind)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def words(count: int, seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(WORDS)}" for _ in range(count))


def files_of(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, by its path in it."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def reload(folder: Path | str, **options: Any) -> PreTrainedModel:
    """A folder as transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval().requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """A run over a checkpoint into a folder of its own.

    Attributes:
        source: the checkpoint.
        save_path: what the run writes.
        content: its configuration.
    """

    source: Path
    save_path: Path
    content: dict[str, Any] = field(repr=False)

    @property
    def arguments(self) -> list[str]:
        """For the command line."""
        file = self.save_path.with_suffix(".yml")
        file.write_text(yaml.safe_dump(self.content, sort_keys=False))
        return ["--config", str(file)]

    def compress(self, *overrides: str) -> llmc.Result:
        return llmc.compress(self.content, overrides)

    def written(self) -> dict[str, str]:
        """Digests of the exported folders' files."""
        return {name: digest for name, digest in files_of(self.save_path).items() if "_model/" in name}


def write_texts(folder: Path) -> dict[str, Path]:
    """A text to calibrate on and one to evaluate on."""
    made = {"calib": folder / "calib.txt", "eval": folder / "eval.txt"}
    made["calib"].write_text(words(400, seed=1))
    made["eval"].write_text(words(WINDOW * WINDOWS + 5, seed=2))
    return made


def make_case(checkpoint: Path, texts: dict[str, Path], save_path: Path, method: Any = "RTN", **changes: Any) -> Case:
    """RTN, 4 bits, asymmetric, groups of 32, into two folders, but for what ``changes`` say."""
    text = {"name": "text", "bs": 1}
    content: dict[str, Any] = {
        "base": {"seed": 42, "device": "cpu"},
        "model": {"path": str(checkpoint), "torch_dtype": "float32"},
        "calib": {
            **text,
            "path": str(texts["calib"]),
            "n_samples": 4,
            "seq_len": 16,
            "preproc": "sequential",
        },
        "eval": {
            **text,
            "path": str(texts["eval"]),
            "seq_len": WINDOW,
            "num_chunks": WINDOWS,
            "eval_pos": ["pretrain", "fake_quant"],
        },
        "quant": {
            "method": method,
            "weight": {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 32},
        },
        "save": {"save_vllm": True, "save_fake": True, "save_path": str(save_path)},
    }
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
    return Case(checkpoint, save_path, content)
