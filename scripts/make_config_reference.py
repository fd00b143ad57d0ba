"""Writes docs/configuration.md from the schema, so that the page can't drift from the code.

python scripts/make_config_reference.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llmc.algorithms import options_types
from llmc.config import Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/make_config_reference.py: edit the descriptions in llmc/config/, then run it. -->

A run is one YAML file; its sections, keys and method names are those of LLMC. The files under
[`configs/`](../configs) are complete.

- **Strict**: an unknown key, a wrong type or a value out of range is an error that names the key, its line and the
  nearest name that exists. All problems of a file are reported at once, before the model is read.
- **Overrides**: `--set quant.weight.bit=3`, as often as you like; the value is YAML. `eval.0.seq_len=512` reaches into
  a list.
- **Known is not the same as available**: the schema knows keys of LLMC that this version can't carry out.
  Using one is an error that names it; [Coming from LLMC](coming-from-llmc.md#what-isnt-there) lists them.
- `eval` may be one section or a list of them. `path: text.txt#0:0.5` takes a part of a file.
- The keys of `quant.special` depend on the method; with several methods `special` is keyed by method. A pruner's are
  those of `sparse.special`.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


def page() -> str:
    parts = [INTRODUCTION, "## Sections\n"]
    shown: dict[type[BaseModel], str] = {}
    for path, model in sections(Config, ""):
        title = f"`{path}`" if path else "top level"
        if model in shown:
            parts.append(f"### {title}\n\n{first_line(model)} The keys are those of {shown[model]}.\n")
        else:
            shown[model] = title
            parts.append(table(title, model))
    parts.append("## Options of the methods\n\nThe keys of `quant.special`; a pruner's, of `sparse.special`.\n")
    for name, model in options_types().items():
        parts.append(table(name, model) if model.model_fields else f"### {name}\n\n{name} has no options.\n")
    return "\n".join(parts)


def sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its dotted path, outermost first; the sections below one are found where it first occurs."""
    seen: set[type[BaseModel]] = set()

    def walk(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
        yield path, model
        if model in seen:
            return
        seen.add(model)
        for name, field in model.model_fields.items():
            inner = section_in(field.annotation)
            if inner is not None and inner is not model:
                below = f"{path}.{name}" if path else name
                yield from walk(inner, f"{below}.NAME" if is_mapping(field.annotation) else below)

    yield from walk(model, path)


def table(title: str, model: type[BaseModel]) -> str:
    lines = [f"### {title}", "", first_line(model), "", "| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", values(field), default(field), field.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def section_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)


def is_mapping(annotation: object) -> bool:
    return get_origin(annotation) is dict or any(is_mapping(part) for part in get_args(annotation))


def default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    if value in ((), {}, None):
        return "none"
    return f"`{value}`"


def values(field: FieldInfo) -> str:
    if field.annotation is Any:
        return "anything"
    if section_in(field.annotation) is not None:
        return "sections by name" if is_mapping(field.annotation) else "section"
    limits = [text for item in field.metadata if (text := limit(item))]
    return ", ".join([" or ".join(dict.fromkeys(kinds(field.annotation))) or "anything", *limits])


def kinds(annotation: object) -> Iterator[str]:
    """What an annotation allows, in plain words; None isn't mentioned."""
    plain = {int: "whole number", float: "number", bool: "True or False", str: "text"}
    origin = get_origin(annotation)
    if annotation in plain:
        yield plain[annotation]  # type: ignore[index]
    elif origin is Annotated:
        yield from kinds(get_args(annotation)[0])
    elif origin is Literal:
        yield from (f"`{choice}`" for choice in get_args(annotation))
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from () if part is NoneType else kinds(part)
    elif origin is tuple:
        inner = [part for part in get_args(annotation) if part is not Ellipsis]
        yield "list of " + " or ".join(dict.fromkeys(kind for part in inner for kind in kinds(part)))
    elif origin is dict:
        yield "mapping"


def limit(item: object) -> str:
    for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        if (bound := getattr(item, attribute, None)) is not None:
            return f"{sign} {re.sub(r'[.]0$', '', str(bound))}"
    return ""


if __name__ == "__main__":
    main()
