"""What stands in the fenced blocks of the documentation is true: it parses, and its files and options exist."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml
from pages import ROOT, blocks

from llmc import cli
from llmc.algorithms import options_types
from llmc.config import load_config

OTHERS = ("llama-quantize", "llama-server", "mlc_llm", "trtllm-serve", "vllm")
"""First words of commands that belong to other programs."""

MODULES = ("lightllm.server.api_server", "sglang.launch_server")
"""The same, behind ``python -m``."""

CONTENT = {"my.yml": "README.md", "your_awq.yml": "docs/coming-from-llmc.md"}
"""Configurations that the reader writes, and the page whose first YAML block stands for them."""

EXAMPLES = ROOT / "docs" / "adding.md"
"""What this page adds exists only there: test_adding.py runs its YAML and its commands."""

METHODS = options_types()


class Parsed(Exception):
    """A program's own parser took its arguments."""


def lines():
    """Each command line once, without those of the worked examples: its words, ``python -m llmc`` as ``llmc``."""
    found = dict.fromkeys(
        shlex.join(command) for block in blocks("bash") if block.page != EXAMPLES for command in block.commands
    )
    return [
        ["llmc", *words[3:]] if words[:3] == ["python", "-m", "llmc"] else words for words in map(shlex.split, found)
    ]


def beginning(*first):
    return [pytest.param(words, id=" ".join(words)[:70]) for words in lines() if words[0] in first]


def every(*languages):
    return [pytest.param(block, id=str(block)) for block in blocks(*languages)]


def first_yaml(page):
    return next(yaml.safe_load(block.text) for block in blocks("yaml", page=ROOT / page) if "model:" in block.text)


@pytest.mark.parametrize("block", every())
def test_a_block_names_its_language(block):
    assert block.language in ("bash", "diff", "json", "python", "text", "yaml")


@pytest.mark.parametrize("block", [block for block in every("yaml") if block.values[0].page != EXAMPLES])
def test_yaml_is_a_configuration_or_a_part_of_one(block):
    content = yaml.safe_load(block.text)
    assert isinstance(content, dict)
    load_config({"model": {"path": "model"}, **content}, methods=METHODS)


@pytest.mark.parametrize("block", every("python"))
def test_python_compiles(block):
    compile(block.text, str(block), "exec")


def test_every_command_is_of_a_known_program():
    ours = {"llmc", "bash", "python", "pip", *OTHERS}
    strange = [words for words in lines() if words[0] not in ours and "=" not in words[0]]
    assert strange == []


@pytest.mark.parametrize("words", beginning("llmc"))
def test_our_parser_takes_a_command_and_its_configuration_is_read(words):
    name = words[1] if words[1:] else ""
    if name in cli._COMMANDS:
        cli._COMMANDS[name][0]().parse_args(words[2:])
        return
    given = cli.parser().parse_args(words[1:])
    source = first_yaml(CONTENT[given.config]) if given.config in CONTENT else ROOT / given.config
    load_config(source, given.overrides, METHODS)


@pytest.mark.parametrize("words", beginning("python"))
def test_a_program_of_ours_exists_and_its_own_parser_takes_its_arguments(words, monkeypatch):
    if words[1] == "-m":
        assert words[2] in MODULES
        return
    file = ROOT / words[1]
    assert file.is_file()
    if "argparse" not in file.read_text(encoding="utf-8"):
        assert words[2:] == []
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.syspath_prepend(file.parent)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)  # dataclasses look there
    spec.loader.exec_module(module)
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.parametrize("words", [one for one in lines() if one[0] == "bash" or "bash" in one])
def test_a_shell_script_exists_and_parses(words):
    script = ROOT / words[words.index("bash") + 1]
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    settings = [word.partition("=")[0] for word in words[: words.index("bash")]]
    text = script.read_text(encoding="utf-8") + (ROOT / "scripts" / "common.sh").read_text(encoding="utf-8")
    assert [name for name in settings if f"${{{name}:" not in text] == []


@pytest.mark.parametrize("words", beginning("pip"))
def test_what_pip_installs_is_an_extra_of_ours(words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [word for word in words[2:] if not word.startswith("-")]
    assert words[1] == "install" and wanted
    for word in wanted:
        name, _, inside = word.rstrip("]").partition("[")
        assert name in ("llmc", ".") and set(filter(None, inside.split(","))) <= extras.keys()


def test_a_translation_has_the_commands_and_the_file_of_the_original():
    ours, theirs = (
        [
            block.commands if block.language == "bash" else yaml.safe_load(block.text)
            for block in blocks("bash", "yaml", page=page)
        ]
        for page in (ROOT / "docs" / "quickstart.md", ROOT / "docs" / "zh" / "quickstart.md")
    )
    assert theirs == ours and ours


def test_the_quick_start_shows_the_numbers_of_the_readme():
    (shown,) = [block.text for block in blocks("text", page=ROOT / "README.md") if block.text.startswith("Done")]
    for page in ("quickstart.md", "zh/quickstart.md"):
        assert shown in [block.text for block in blocks("text", page=ROOT / "docs" / page)], "as the README has them"
