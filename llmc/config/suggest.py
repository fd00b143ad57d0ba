"""What is wrong with a configuration, where it stands in the user's file, and which name was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from llmc.errors import ConfigError

KeyPath = tuple[str | int, ...]
Places = dict[KeyPath, int | str]  # the line of a key, or the override that set it

_MOST_SHOWN = 8
_CLOSE = 0.65


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that `word` most resembles, upper and lower case being the same; None if nothing is close."""

    def likeness(name: str) -> float:
        return SequenceMatcher(None, word.lower(), name.lower()).ratio()

    best = max(sorted(names), key=likeness, default=None)
    return best if best is not None and likeness(best) >= _CLOSE else None


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """A clause to put behind an error message; empty if no name is close."""
    name = nearest(word, names) if isinstance(word, str) else None
    return f"; did you mean {name!r}?" if name else ""


def show(value: object) -> str:
    """The offending value as the user would write it, cut to a readable length."""
    if value is None:
        return "an empty value"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted(path: KeyPath) -> str:
    """`("eval", 0, "bs")` as `eval.0.bs`."""
    return ".".join(str(part) for part in path)


class Misfit(ValueError):
    """A rule across fields is broken."""

    def __init__(self, key: str, text: str) -> None:
        """Say `text` about `key`, the field of the section that the user should look at."""
        super().__init__(text)
        self.key = key


def refuse_if(broken: object, key: str, text: str) -> None:
    """State one rule across the fields of a section."""
    if broken:
        raise Misfit(key, text)


@dataclass
class Document:
    """A configuration on its way from the file to the schema.

    Renaming and regrouping keys must not make an error point at a place the user never wrote. So every path of the
    changing `data` can be traced back, by `moved`, to a path of the file, and by `places` to a line or an override.
    """

    name: str
    data: dict[str, Any]
    places: Places = field(default_factory=dict)
    moved: dict[KeyPath, KeyPath] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: dict[str, int] = field(default_factory=dict)
    closed: set[KeyPath] = field(default_factory=set)

    def origin(self, path: KeyPath) -> KeyPath:
        """The path under which the file has what `data` now has under `path`."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.moved:
                return self.moved[path[:length]] + path[length:]
        return path

    def move(self, new: KeyPath, old: KeyPath) -> None:
        """Record that what stood at `old` stands at `new` from now on."""
        self.moved[new] = self.origin(old)

    def where(self, path: KeyPath) -> str:
        """`quant.weight.bit (line 14)`; a key that the file lacks is below the line of its section."""
        path = self.origin(path)
        held, place = self._place(path)
        at = f"line {place}" if isinstance(place, int) else place
        return f"{dotted(path) or 'the whole file'}{f' ({at})' if held else f' (below {at})' if at else ''}"

    def _place(self, path: KeyPath) -> tuple[bool, int | str]:
        """Where the innermost written part of a path stands, and whether that is the path itself."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return length == len(path), self.places[path[:length]]
        return False, ""

    def note(self, path: KeyPath, text: str) -> None:
        """Tell the user, without stopping, what happens to a key."""
        line = f"{self.where(path)}: {text}"
        if line not in self.notes:
            self.notes.append(line)

    def problem(self, path: KeyPath, text: str, *, final: bool = False) -> None:
        """Something that must be mended; the same finding in two copies of one key counts once.

        A final problem says all there is to say about its key: later ones at the same place are dropped.
        """
        origin = self.origin(path)
        if origin not in self.closed:
            _, place = self._place(origin)
            self.problems[f"{self.where(path)}: {text}"] = place if isinstance(place, int) else 0
        if final:
            self.closed.add(origin)

    def raise_problems(self) -> None:
        """Raise one ConfigError with everything found, in the order of the file; or return."""
        if not self.problems:
            return
        count = len(self.problems)
        lines = [f"{self.name}: {count} problem{'s' if count > 1 else ''} in the configuration"]
        lines += [f"  {problem}" for problem in sorted(self.problems, key=self.problems.__getitem__)[:_MOST_SHOWN]]
        if count > _MOST_SHOWN:
            lines.append(f"  ... and {count - _MOST_SHOWN} more")
        raise ConfigError("\n".join(lines), "Mend these keys and start again; nothing was loaded or written.")


def explain(
    document: Document,
    error: ValidationError,
    root: type[BaseModel],
    prefix: KeyPath = (),
    homes: Mapping[str, list[str]] | None = None,
) -> None:
    """Add each finding of pydantic to the document's problems, in plain words.

    Args:
        document: gets the problems.
        error: what the validation of `root` raised.
        root: the model that was validated; its fields are the names to suggest.
        prefix: where in the document the validated part stands.
        homes: for each key of the schema the sections it belongs to, to recognise a key in the wrong place.
    """
    items = error.errors(include_url=False)
    unknown: list[KeyPath] = [tuple(item["loc"]) for item in items if item["type"] == "extra_forbidden"]
    for item in items:
        path: KeyPath = tuple(item["loc"])
        value, context = item["input"], item.get("ctx", {})
        match item["type"]:
            case "extra_forbidden":
                section = section_at(root, path[:-1])
                text = unknown_key(str(path[-1]), section.model_fields if section else (), homes or {})
            case "missing":
                if any(key[:-1] == path[:-1] and nearest(str(key[-1]), [str(path[-1])]) for key in unknown):
                    continue  # it is there, misspelt, and reported as such
                text = _missing(root, path)
            case "value_error":
                cause = context["error"]
                text = str(cause)
                path = (*path, cause.key) if isinstance(cause, Misfit) else path
            case "too_short" if value:
                continue  # its entries are wrong, and reported as such
            case kind:
                text = _plain(kind, value, context, item["msg"])
        document.problem(prefix + path, text)


def unknown_key(key: str, known: Iterable[str], homes: Mapping[str, list[str]]) -> str:
    """Why a key isn't accepted: misspelt, in the wrong section, or not ours at all."""
    known = list(known)
    if hint := did_you_mean(key, known):
        return f"unknown key{hint}"
    if key in homes:
        return f"unknown key here; it belongs in {' or '.join(homes[key][:3])}"
    return f"unknown key; known here: {', '.join(known)}" if known else "unknown key"


def _missing(root: type[BaseModel], path: KeyPath) -> str:
    section = section_at(root, path[:-1])
    found = section.model_fields.get(str(path[-1])) if section else None
    if not found or not found.description:
        return "missing"
    choices = _choices(found.annotation)
    listing = f" One of {', '.join(choices)}." if choices else ""
    return f"missing; {found.description}{listing}"


def _choices(annotation: object) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for argument in get_args(annotation) for choice in _choices(argument)]


def _plain(kind: str, value: object, context: Mapping[str, Any], message: str) -> str:
    shown = show(value)
    unquote = "; remove the quotes" if isinstance(value, str) and _reads_as_scalar(value) else ""
    match kind:
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            return f"{shown} is not one of {', '.join(choices)}{did_you_mean(value, choices)}"
        case "int_type" | "int_parsing" | "int_from_float":
            return f"{shown} is not a whole number{unquote}"
        case "float_type" | "float_parsing" | "finite_number":
            return f"{shown} is not a number{unquote}"
        case "bool_type" | "bool_parsing":
            return f"{shown} is neither True nor False{unquote}"
        case "string_type":
            return f"{shown} is not text"
        case "tuple_type" | "list_type":
            return f"{shown} is not a list"
        case "dict_type" | "mapping_type" | "model_type" | "model_attributes_type":
            return f"{shown} stands where a section with keys is expected"
        case "greater_than_equal":
            return f"{shown} is too small; the least is {context['ge']}"
        case "greater_than":
            return f"{shown} is too small; it must be above {context['gt']}"
        case "less_than_equal":
            return f"{shown} is too large; the most is {context['le']}"
        case "less_than":
            return f"{shown} is too large; it must be below {context['lt']}"
        case "too_short":
            return "empty; at least one entry is needed"
        case "invalid_key":
            return "this key is not text"
    return f"{shown}: {message[:1].lower()}{message[1:].replace('Input should', 'the value should')}"


def _reads_as_scalar(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false", text.strip().lower()) is not None


def section_at(root: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model that describes the section at `path`; list indexes and free mapping keys are stepped over."""
    model, free_key = root, False
    for part in path:
        if isinstance(part, int):
            continue
        if free_key:
            free_key = False
            continue
        if part not in model.model_fields:
            return None
        inner, free_key = _section_in(model.model_fields[part].annotation)
        if inner is None:
            return None
        model = inner
    return model


def _section_in(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    """The model inside `X | None`, `tuple[X, ...]` or `dict[str, X]`, and whether a free mapping key leads to it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for argument in get_args(annotation):
        model, free_key = _section_in(argument)
        if model is not None:
            return model, free_key or get_origin(annotation) is dict
    return None, False


def key_homes(root: type[BaseModel]) -> dict[str, list[str]]:
    """For every key of the schema, the dotted sections that have it; "the top level" for the outermost."""
    homes: dict[str, list[str]] = {}
    for section, key in _walk(root, (), ()):
        homes.setdefault(key, []).append(dotted(section) or "the top level")
    return homes


def _walk(model: type[BaseModel], at: KeyPath, above: tuple[type[BaseModel], ...]) -> Iterator[tuple[KeyPath, str]]:
    for key, info in model.model_fields.items():
        yield at, key
        inner, free_key = _section_in(info.annotation)
        if inner is not None and not free_key and inner not in (*above, model):
            yield from _walk(inner, (*at, key), (*above, model))
