"""What dry runs of configurations need: a tokenizer of bytes, and a little local text instead of a section's own."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_bytes_tokenizer(folder: Path) -> int:
    """Each byte is a token; returns how many there are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return len(alphabet)


def small(section: str, text: Path) -> list[str]:
    """Overrides that replace the text of a section, such as calib or eval.0, by a little local one."""
    values = {"name": "text", "path": text, "download": False, "seq_len": 32}
    values |= (
        {"n_samples": 2, "preproc": "sequential", "apply_chat_template": False}
        if section == "calib"
        else {"num_chunks": 2}
    )
    return [f"{section}.{key}={value}" for key, value in values.items()]
