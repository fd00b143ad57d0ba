"""From what is shown to one HTML file: templates, style and script are parts of this package, and end up inside it."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from . import words
from .compare import Comparison
from .sections import Page

_ASSETS = files(__package__) / "assets"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    """Everything that comes from a run is escaped; what isn't there is an error."""
    made = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["style"] = Markup(_asset("page.css"))
    made.globals["script"] = Markup(_asset("page.js"))
    made.filters |= {"number": words.number, "percent": words.percent, "plural": words.plural}
    return made


def render_run(page: Page) -> str:
    """The report of one run. The same page gives the same text."""
    return _render("run.html", page=page)


def render_comparison(comparison: Comparison) -> str:
    """The comparison of several runs."""
    return _render("compare.html", comparison=comparison)


def _render(template: str, **content: Any) -> str:
    return _environment().get_template(template).render(**content)
