"""A tiny Llama with a tokenizer, and tasks in its words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_tasks import write_own_tasks
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

WORDS = 190


@pytest.fixture(scope="session")
def folder(checkpoint: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that Transformers loads, with its tokenizer."""
    made = tmp_path_factory.mktemp("tasks") / "llama"
    shutil.copytree(checkpoint("llama").folder, made)
    entries = ["<s>", "<unk>", "</s>", *(f"w{index}" for index in range(WORDS))]
    backend = Tokenizer(WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(made)
    return made


@pytest.fixture(scope="session")
def model(checkpoint: Callable[[str], Any]) -> PreTrainedModel:
    """The same as a whole model, in float32."""
    return checkpoint("llama").model()


@pytest.fixture(scope="session")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files with their data."""
    return write_own_tasks(tmp_path_factory.mktemp("own") / "tasks")
