"""What the README and the documentation show is true: YAML parses, links and paths lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from llmc.algorithms import ALGORITHMS, options_types
from llmc.cli import eval_parser, export_parser, parser, verify_parser
from llmc.config import load_config
from llmc.models import ADAPTERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "configs" / "data" / "README.md"]


def blocks(language):
    """Each fenced block of a language with the page it stands on."""
    for page in PAGES:
        for found in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            yield pytest.param(found, id=f"{page.relative_to(ROOT)}-{found.split()[0]}")


@pytest.mark.parametrize("block", list(blocks("yaml")))
def test_yaml_is_a_configuration_or_a_part_of_one(block):
    content = yaml.safe_load(block)
    load_config({"model": {"path": "model"}, **content}, methods=options_types())


@pytest.mark.parametrize("block", list(blocks("python")))
def test_python_compiles(block):
    compile(block, "a block of the documentation", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    paths = re.findall(r"\b(?:configs|scripts|docs|llmc|tests|benchmarks)/[\w./-]*\w\.(?:md|py|sh|yml|txt)", text)
    # A worked example makes files that aren't there.
    wrong = [target for target in links if not (page.parent / target).exists()]
    wrong += [path for path in paths if not (ROOT / path).exists() and page.name != "adding.md"]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.parametrize(
    ("command", "made"),
    [("--config", parser), ("eval", eval_parser), ("export", export_parser), ("verify", verify_parser)],
)
def test_command_lines_have_only_options_that_exist(page, command, made):
    known = {option for action in made()._actions for option in action.option_strings}
    lines = re.findall(rf"^.*\bllmc {command}.*$", page.read_text(encoding="utf-8"), re.M)
    assert {option for line in lines for option in re.findall(r"(?<!\S)--[\w-]+", line)} <= known


@pytest.mark.parametrize("script", ["make_config_reference", "make_backends_table"])
def test_generated_pages_are_up_to_date(script):
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), f"run scripts/{script}.py"


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_a_method_has_a_page_with_all_its_options(algorithm):
    page = ROOT / "docs" / "methods" / f"{algorithm.name.lower()}.md"
    text = page.read_text(encoding="utf-8")
    assert [name for name in algorithm.options_type.model_fields if f"`{name}`" not in text] == []


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_a_family_has_a_line_with_all_its_names(adapter):
    lines = [line.split("|") for line in (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()]
    cells = [[set(re.findall(r"`([^`]+)`", cell)) for cell in line[2:4]] for line in lines if len(line) == 7]
    assert [set(adapter.model_types), {adapter.name, *adapter.aliases}] in cells
