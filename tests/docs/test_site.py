"""The site is built without a warning, and its pages ask no other host for anything."""

from __future__ import annotations

import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from pages import ROOT

FETCHES = {"audio", "embed", "iframe", "img", "input", "object", "script", "source", "track", "video"}
LINKS = {"icon", "stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}
ATTRIBUTES = ("src", "srcset", "href", "data", "poster")


class Fetched(HTMLParser):
    """What a browser fetches by itself when it shows a page; links that a reader follows aren't that."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        rel = set((given.get("rel") or "").split())
        if tag in FETCHES or (tag == "link" and rel & LINKS):
            self.found += [value for name in ATTRIBUTES if (value := given.get(name))]
        self.found += re.findall(r"url\(\s*['\"]?([^)'\"]+)", given.get("style") or "")
        if "mermaid" in (given.get("class") or "").split():
            self.found.append("https://unpkg.com/mermaid")  # the theme fetches what draws it


def in_styles(text: str) -> list[str]:
    return re.findall(r"(?:url\(|@import)\s*['\"]?([^)'\";]+)", text)


def elsewhere(addresses: list[str]) -> list[str]:
    return [address for address in addresses if re.match(r"\s*(?:[a-z][a-z0-9+.-]*:)?//", address, re.I)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    told = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        config.plugins.on_startup(command="build", dirty=False)
        build(config)  # raises if something was told
        config.plugins.on_shutdown()
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert told == []
    return folder


def test_what_would_be_fetched_elsewhere_is_found():
    page = '<link rel="preconnect" href="https://fonts.gstatic.com"><a href="https://a.b"><img src="//c.d/e.png"><p>'
    assert elsewhere(Fetched(page).found) == ["https://fonts.gstatic.com", "//c.d/e.png"]
    assert elsewhere(Fetched('<pre class="mermaid">').found) and elsewhere(in_styles("@import 'https://a.b/c.css';"))
    assert elsewhere(in_styles("a{background:url(data:image/svg+xml;utf8,x)} b{src:url(../d.woff)}")) == []


def test_no_page_asks_another_host(site):
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md")))
    for page in [*pages, site / "404.html"]:
        text = page.read_text(encoding="utf-8")
        styles = "".join(re.findall(r"<style[^>]*>(.*?)</style>", text, re.S))
        assert elsewhere(Fetched(text).found + in_styles(styles)) == [], page
    for style in site.rglob("*.css"):
        assert elsewhere(in_styles(style.read_text(encoding="utf-8"))) == [], style


def test_every_configuration_and_every_command_has_its_place(site):
    examples = (site / "examples" / "index.html").read_text(encoding="utf-8")
    files = [file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.yml")]
    assert [file for file in files if f">{file}<" not in examples] == []
    commands = (site / "commands" / "index.html").read_text(encoding="utf-8")
    assert all(f"python -m llmc {name}" in commands for name in ("export", "verify", "inspect"))


def test_drawings_are_part_of_the_page(site):
    page = (site / "concepts" / "index.html").read_text(encoding="utf-8")
    assert page.count('<span class="drawing" role="img" aria-label=') == 3 and "drawing.svg" not in page


def test_links_to_configurations_lead_to_their_text(site):
    page = (site / "mixed" / "index.html").read_text(encoding="utf-8")
    (target,) = re.findall(r'href="(\.\./examples/#[^"]+)"', page)
    assert f'id="{Path(target).name.partition("#")[2]}"' in (site / "examples" / "index.html").read_text("utf-8")
