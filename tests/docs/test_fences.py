"""What stands in the fenced blocks of the documentation is true: it parses, and its files and options exist."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from pages import ROOT, blocks

from llmc import cli
from llmc.algorithms import options_types
from llmc.config import load_config

SERVERS = ("llama-quantize", "llama-server", "mlc_llm", "trtllm-serve", "vllm")
"""First words of commands that belong to other programs."""

MODULES = ("lightllm.server.api_server", "sglang.launch_server")
"""The same, behind ``python -m``."""

CONTENT = {"my.yml": "README.md", "your_awq.yml": "docs/coming-from-llmc.md"}
"""Configurations that the reader writes, and the page whose whole one stands for them."""

METHODS = options_types()
ADDED = ("Tight", "save_codes", "SeedOss")
"""What docs/adding.md adds: test_adding.py runs it there."""


class Parsed(Exception):
    """A program's own parser took its arguments."""


def every(*languages):
    return [pytest.param(block, id=str(block)) for block in blocks(*languages)]


def commands(first):
    """Each command line that begins with a word, once."""
    found = {}
    for block in blocks("bash"):
        for command in block.commands:
            if command[0] == first or (first == "llmc" and command[:3] == ["python", "-m", "llmc"]):
                found.setdefault(" ".join(command[3 if command[0] == "python" == command[0] != first else 1 :]), block)
    return [pytest.param(words, block, id=words[:60]) for words, block in found.items()]


@pytest.mark.parametrize("block", every())
def test_a_block_names_its_language(block):
    assert block.language in ("bash", "diff", "json", "python", "text", "yaml")


@pytest.mark.parametrize("block", every("yaml"))
def test_yaml_is_a_configuration_or_a_part_of_one(block):
    content = yaml.safe_load(block.text)
    if any(name in block.text for name in ADDED):
        pytest.fail(f"{block} is made by nobody") if block.page.name != "adding.md" else None
        return
    loaded = load_config({"model": {"path": "model"}, **content}, methods=METHODS)
    assert set(content) <= set(type(loaded.config).model_fields)
