"""Links and paths of the README and the documentation lead somewhere; its generated and required parts are there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from llmc.algorithms import ALGORITHMS
from llmc.models import ADAPTERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "configs" / "data" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    paths = re.findall(r"\b(?:configs|scripts|docs|llmc|tests|benchmarks)/[\w./-]*\w\.(?:md|py|sh|yml|txt)", text)
    # A worked example makes files that aren't there.
    wrong = [target for target in links if not (page.parent / target).exists()]
    wrong += [path for path in paths if not (ROOT / path).exists() and page.name != "adding.md"]
    assert not wrong


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
