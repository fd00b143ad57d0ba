"""From a YAML file, with overrides from the command line, to a checked `Config`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from llmc.config.budget import gather_budget
from llmc.config.legacy import METHODS, SPECIAL_KEYS, modernise
from llmc.config.schema import Config
from llmc.config.suggest import (
    Document,
    KeyPath,
    Places,
    did_you_mean,
    dotted,
    explain,
    key_homes,
    show,
    unknown_key,
)
from llmc.errors import ConfigError

Methods = Mapping[str, type[BaseModel]]
_NO_METHODS: Methods = MappingProxyType({})
_QUANT, _VISION, _SPARSE = ("quant",), ("quant", "vision"), ("sparse",)


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that may be run.

    Attributes:
        config: the whole configuration, checked and normalised.
        warnings: what happened to keys of older files; for the caller to print once.
        resolved: the normalised configuration as plain JSON values; loading it again gives the same configuration.
    """

    config: Config
    warnings: tuple[str, ...]
    resolved: dict[str, Any]


def load_config(
    source: Path | str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    methods: Methods = _NO_METHODS,
) -> LoadedConfig:
    """Read, complete and check a configuration; whatever is wrong with it is raised as one ConfigError.

    Args:
        source: path of a YAML file, or its content as a mapping.
        overrides: `key.path=value` each, applied in order before anything is checked; the value is YAML.
        methods: the available methods and the model of each one's options. Without any, the names are only checked
            against LLMC's and the options stay unresolved.
    """
    document = _read(source)
    for override in overrides:
        _override(document, override)
    modernise(document)
    gather_budget(document)
    options = {at: _resolve_options(document, at, methods) for at in (_QUANT, _VISION, _SPARSE)}
    try:
        config = Config.model_validate(document.data)
    except ValidationError as error:
        explain(document, error, Config, homes=_homes())
        document.raise_problems()
        raise  # nothing was found to say: better the validator's own words than none
    document.raise_problems()
    quant, sparse = config.quant, config.sparse
    if quant is not None:
        vision = quant.vision and quant.vision.with_options(options[_VISION])
        quant = quant.model_copy(update={"vision": vision}).with_options(options[_QUANT])
    if sparse is not None:
        sparse = sparse.with_options(options[_SPARSE])
    config = config.model_copy(update={"quant": quant, "sparse": sparse})
    resolved: dict[str, Any] = config.model_dump(mode="json")
    for at, found in options.items():
        if found:
            section = reduce(getitem, at, resolved)
            section["special"] = {name: model.model_dump(mode="json") for name, model in found.items()}
    return LoadedConfig(config, tuple(document.notes), resolved)


@cache
def _homes() -> dict[str, list[str]]:
    homes = key_homes(Config)
    for key in SPECIAL_KEYS:
        homes.setdefault(key, []).append("quant.special")
    return homes


# -- reading -----------------------------------------------------------------------------------------------------------
class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-5 is a number, 2024-01-01 is text, and so is 2:4 (by the book 124, in base 60)."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the shape that PyYAML prescribes)
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":float", ":int"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)


def _read(source: Path | str | Mapping[str, Any]) -> Document:
    if isinstance(source, Mapping):
        return Document("configuration", _unshared(source))
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: can't be read: {reason}", "Give the path of a YAML file.") from error
    places: Places = {}
    data = _parse(text, str(path), places)
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {show(data)}, not sections with keys"
        raise ConfigError(f"{path}: the file {what}", "See configs/ for complete files.")
    return Document(str(path), _unshared(data), places)


def _parse(text: str, name: str, places: Places) -> object:
    """The value of a YAML text; `places` gets the line of each of its keys."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _locate(node, (), places, name, [])
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{at}: not valid YAML: {error.problem or error.context}", _YAML_REMEDY) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}", _YAML_REMEDY) from error


_YAML_REMEDY = "Look at the indentation, the colons and the quotes at this place and just before it."


def _locate(node: yaml.Node, path: KeyPath, places: Places, name: str, above: list[yaml.Node]) -> None:
    """Record the line of each key below `node`; a key that a merge (`<<`) brings in has the line of its anchor."""
    if any(node is parent for parent in above):
        raise ConfigError(f"{name}, line {node.start_mark.line + 1}: {dotted(path)} contains itself", _YAML_REMEDY)
    above = [*above, node]
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*path, index)] = item.start_mark.line + 1
            _locate(item, (*path, index), places, name, above)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for merged in [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]:
        for source in merged.value if isinstance(merged, yaml.SequenceNode) else [merged]:
            inherited: Places = {}
            _locate(source, path, inherited, name, above)
            places.update({at: line for at, line in inherited.items() if at not in places})
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{name}, line {line}: the key {show(key.value)} is not text", "Put it into quotes.")
        if key.value in lines:
            both = f"lines {lines[key.value]} and {line}"
            raise ConfigError(f"{name}: {dotted((*path, key.value))} stands there twice, {both}", "Keep one of them.")
        lines[key.value] = line
        _place(places, (*path, key.value), line)
        _locate(value, (*path, key.value), places, name, above)


def _place(places: Places, path: KeyPath, place: int | str) -> None:
    """Set the place of a key, and forget those of what stood below it before."""
    for stale in [known for known in places if known[: len(path)] == path]:
        del places[stale]
    places[path] = place


def _unshared(value: Any) -> Any:
    """A copy in plain dicts and lists, in which no part occurs twice as YAML aliases make it."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"the key {show(key)} is not text", "Give every key as a string.")
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list | tuple) else value


# -- overriding --------------------------------------------------------------------------------------------------------
def _override(document: Document, text: str) -> None:
    """Set one key. Sections on the way are made if need be; whether the key exists is left to the validation."""
    key_path, equals, value_text = text.partition("=")
    parts = key_path.strip().split(".")
    example = "Write for example quant.weight.bit=8 or eval.0.seq_len=512."
    if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
        raise ConfigError(f"the override {text!r} is not of the form key.path=value", example)
    value = _unshared(_parse(value_text, f"the override {text!r}", {}))
    here: Any = document.data
    path: KeyPath = ()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if path == ("eval",) and part == "0" and isinstance(here, dict):
            continue  # a lone evaluation counts as a list of one
        at = _index(here, part, text, example)
        path = (*path, at)
        if following is None:
            here[at] = value
        elif isinstance(here, dict) and here.get(part) is None:
            here[at] = {}
            _place(document.places, path, f"override {text}")
        here = here[at]
    _place(document.places, path, f"override {text}")


def _index(container: object, part: str, text: str, example: str) -> str | int:
    if isinstance(container, dict):
        return part
    if isinstance(container, list):
        if part.isdecimal() and int(part) < len(container):
            return int(part)
        reason = f"there is a list here, with the indexes 0..{len(container) - 1}" if container else "the list is empty"
        raise ConfigError(f"the override {text!r} fails at {part!r}: {reason}", example)
    raise ConfigError(f"the override {text!r} fails at {part!r}: {show(container)} has no keys below it", example)


# -- options of the methods --------------------------------------------------------------------------------------------
def _resolve_options(document: Document, at: tuple[str, ...], methods: Methods) -> dict[str, BaseModel]:
    """The options of each method of a section, from its raw `special`; what is wrong with them becomes problems."""
    raw: Any = document.data
    for key in at:
        raw = raw.get(key) if isinstance(raw, dict) else None
    given = raw.get("method") if isinstance(raw, dict) else None
    special = (raw.get("special") or {}) if isinstance(raw, dict) else {}
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not isinstance(special, dict):
        return {}  # for the schema to refuse
    if names == ["TokenReduction"]:
        return {}  # options of methods for images, which nothing here reads
    if at != _SPARSE:
        for index, name in enumerate(names):
            path: KeyPath = (*at, "method") if isinstance(given, str) else (*at, "method", index)
            if text := _unavailable(name, methods):
                document.problem(path, text)
    options: dict[str, BaseModel] = {}
    for name, (path, values) in _by_method(document, (*at, "special"), names, special, methods).items():
        kept = _known_options(document, path, name, values, methods)
        if name in methods:
            try:
                options[name] = methods[name].model_validate(kept)
            except ValidationError as error:
                explain(document, error, methods[name], path)
    return options


def _unavailable(name: str, methods: Methods) -> str:
    """Why a method can't be used; empty if it can."""
    if name in methods or (not methods and name in METHODS):
        return ""
    available = f"available: {', '.join(sorted(methods or METHODS))}"
    if name in METHODS:
        return f"method {name!r} isn't available in this version; {available}"
    return f"there is no method {name!r}{did_you_mean(name, [*methods, *METHODS])}; {available}"


def _by_method(
    document: Document, at: KeyPath, names: list[str], special: dict[str, Any], methods: Methods
) -> dict[str, tuple[KeyPath, dict[str, Any]]]:
    """The raw options of each method and where they stand, be they keyed by method or flat (for a single method)."""
    result: dict[str, tuple[KeyPath, dict[str, Any]]] = {name: ((*at, name), {}) for name in names}
    flat: dict[str, Any] = {}
    for key, value in special.items():
        if key in names and (value is None or isinstance(value, dict)):
            result[key] = ((*at, key), value or {})
        elif key in names:
            document.problem((*at, key), f"{show(value)} stands where the options of {key} are expected")
        elif key in METHODS or key in methods:
            document.problem((*at, key), f"{key} isn't in {dotted(at[:-1])}.method, so that it can't have options")
        else:
            flat[key] = value
    if len(names) == 1 and names[0] not in special:
        return {names[0]: (at, flat)}
    for key in flat:
        if len(names) == 1:
            document.problem((*at, key), f"stands beside {names[0]}; put it below {names[0]}")
            continue
        owner = next((name for name in names if name in methods and key in methods[name].model_fields), names[-1])
        if key in _all_options(methods):
            text = "with several methods the options are keyed by method"
            document.problem((*at, key), f"{text}; write special: {{{owner}: {{{key}: {flat[key]}}}}}")
        else:
            document.problem((*at, key), f"unknown key{did_you_mean(key, names)}; known here: {', '.join(names)}")
    return result


def _all_options(methods: Methods) -> set[str]:
    return {*SPECIAL_KEYS, *(key for model in methods.values() for key in model.model_fields)}


def _known_options(
    document: Document, at: KeyPath, name: str, values: dict[str, Any], methods: Methods
) -> dict[str, Any]:
    """The options that the method has. Those of other methods are passed over with a note, as LLMC does silently."""
    own = methods[name].model_fields if name in methods else {}
    everyones = _all_options(methods)
    for key in values:
        if key in own or (name not in methods and key in everyones):
            continue
        if key in everyones:
            document.note((*at, key), f"ignored by {name}; an option of another method")
        else:
            hint = did_you_mean(key, own) or did_you_mean(key, everyones)
            document.problem((*at, key), f"unknown key{hint}" if hint else unknown_key(key, own, {}))
    return {key: value for key, value in values.items() if key in own}
