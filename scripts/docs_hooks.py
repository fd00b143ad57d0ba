"""What MkDocs can't do by itself: pages made of configs/ and of the command line, drawings that follow the palette."""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from llmc import cli

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
EXAMPLES, COMMANDS = "examples.md", "commands.md"
_CONFIG_LINK = re.compile(r"\]\((?:\.\./)+configs(?:/([\w./-]+\.yml))?\)")
_DRAWING = re.compile(r'<img alt="([^"]*)" src="[^"]*assets/([\w-]+)\.drawing\.svg"[^>]*>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    files.append(File.generated(config, EXAMPLES, content=examples()))
    files.append(File.generated(config, COMMANDS, content=commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to ``configs/``, or a file in it, lead to where the site shows them."""
    place = "../" * page.file.src_uri.count("/") + EXAMPLES
    return _CONFIG_LINK.sub(lambda found: f"]({place}{f'#{anchor(found[1])}' if found[1] else ''})", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put drawings into the page itself, where the style sheet reaches their colours."""
    return _DRAWING.sub(lambda found: drawing(found[2], found[1]), html)


def drawing(name: str, text: str) -> str:
    """The SVG with what it shows in words for those who can't see it."""
    svg = (ROOT / "docs" / "assets" / f"{name}.drawing.svg").read_text(encoding="utf-8")
    return f'<span class="drawing" role="img" aria-label="{text}">{svg}</span>'


def anchor(name: str) -> str:
    """The place of ``awq/awq_w4a16.yml`` on the page."""
    return re.sub(r"[^\w-]", "-", name.removesuffix(".yml"))


def examples() -> str:
    """The page with every file under ``configs/``."""
    parts = [
        "# Complete files\n",
        "Every file of the folder `configs/`. Each one is read, and its dry run is done, by a test. Put in the path of "
        "your model and of your text, in the file or by `--set model.path=…`.\n",
    ]
    for folder in sorted({file.parent for file in CONFIGS.rglob("*.yml")}):
        name = folder.relative_to(CONFIGS)
        parts.append(f"## {name}\n" if folder != CONFIGS else "## To begin with\n")
        parts += [example(file) for file in sorted(folder.glob("*.yml"))]
    return "\n".join(parts)


def example(file: Path) -> str:
    """A file to unfold and copy."""
    name, text = str(file.relative_to(CONFIGS)), file.read_text(encoding="utf-8").rstrip()
    summary = f"<summary>{file.stem}</summary>"
    block = f'```yaml title="configs/{name}"\n{text}\n```'
    return f'<details class="file" id="{anchor(name)}" markdown="1">\n{summary}\n\n{block}\n\n</details>\n'


def commands() -> str:
    """The page with what each command says of itself."""
    parts = [
        "# Command line\n",
        "`llmc` and `python -m llmc` are the same. What a command prints with `--help`:\n",
        section("A run", cli.parser()),
    ]
    parts += [section(f"`llmc {name}`", make()) for name, (make, _) in cli._COMMANDS.items()]
    return "\n".join(parts)


def section(title: str, parser: argparse.ArgumentParser) -> str:
    """A command's help, lines as wide as a page."""
    parser.formatter_class = partial(parser.formatter_class, width=88)
    return f"## {title}\n\n```text\n{parser.format_help().rstrip()}\n```\n"
