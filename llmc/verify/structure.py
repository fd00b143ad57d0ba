"""The tensors of a folder with what its model and its ``quantization_config`` ask for: names, shapes, dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..stream.headers import TensorEntry
from ..stream.skeleton import Anatomy
from .files import Stored
from .findings import Report
from .layouts import DENSE, FLOATS, ONE, Layout, Part, name_of
from .methods import Method

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Linears side by side that backends run as one."""

_LEFTOVERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")  # of older checkpoints; loaders pass over them
_CODES = ("weight_packed", "qweight", "weight_scale", "weight_scale_inv")
_CONFIG = "config.json"
_MEND = "mend quantization_config in config.json, or export the folder again"


@dataclass(frozen=True)
class Module:
    """A Linear or embedding whose tensors are as they ought to be.

    Attributes:
        name: in the checkpoint.
        shape: of its weight, ``[out, in]``.
        layout: how it is stored.
        parts: its tensors by their names behind the module's.
    """

    name: str
    shape: tuple[int, int]
    layout: Layout
    parts: Mapping[str, TensorEntry]


@dataclass
class Structure:
    """What of a folder is sound enough for its values to be looked at.

    Attributes:
        modules: Linears and embeddings.
        plain: everything else.
        fused: modules that backends run as one.
    """

    modules: dict[str, Module] = field(default_factory=dict)
    plain: dict[str, TensorEntry] = field(default_factory=dict)
    fused: list[list[Module]] = field(default_factory=list)


def check_structure(model: Anatomy, method: Method, stored: Stored, report: Report) -> Structure:
    """Compare, and report what is missing, too much or of another shape or dtype."""
    return _Check(_as_named(model, stored), method, stored, report).run()


def _as_named(model: Anatomy, stored: Stored) -> Anatomy:
    """The model with names as this checkpoint has them: some leave out what all begin with."""
    prefix = model.prefix
    if any(name.startswith(prefix) for name in stored.entries) or not stored.entries:
        return model
    shapes = {name.removeprefix(prefix): shape for name, shape in model.shapes.items()}
    classes = {name.removeprefix(prefix): kind for name, kind in model.classes.items()}
    tied = frozenset(name.removeprefix(prefix) for name in model.tied)
    return Anatomy(shapes, classes, tied, prefix, model.modules)


class _Check:
    def __init__(self, model: Anatomy, method: Method, stored: Stored, report: Report) -> None:
        self._model, self._method, self._stored, self._report = model, method, stored, report
        self._parts: dict[str, list[str]] = {}
        for name in stored.entries:
            module, _, part = name.rpartition(".")
            self._parts.setdefault(module, []).append(part)
        self._layouts: dict[str, Layout] = {}
        self._expected: dict[str, Part] = {}
        self._settled: set[str] = set()  # tensors of modules about which enough has been said
        self._result = Structure()

    def run(self) -> Structure:
        """All checks in turn."""
        for name, shape in self._model.shapes.items():
            module, _, part = name.rpartition(".")
            kind = self._model.classes.get(module)
            if part == "weight" and len(shape) == 2 and kind in ("Linear", "Embedding"):
                self._plan(module, kind, (shape[0], shape[1]))
            else:
                self._expected[name] = Part((shape,), FLOATS)
        self._plan_cache()
        for name, expected in self._expected.items():
            self._tensor(name, expected)
        self._extra()
        self._collect()
        self._check_names()
        self._check_fused()
        self._tell()
        return self._result

    def _tell(self) -> None:
        """What was looked at."""
        seen = len(self._expected.keys() & self._stored.entries.keys())
        quantized = [layout.describe() for layout in self._layouts.values() if layout != DENSE]
        kinds = f": {'; '.join(dict.fromkeys(quantized))}" if quantized else ""
        self._report.checked.append(
            f"tensors: {seen} by name, shape and dtype; {len(quantized)} of {len(self._layouts)} Linears and "
            f"embeddings quantized{kinds}"
        )

    def _plan(self, module: str, kind: str, shape: tuple[int, int]) -> None:
        """What is expected of a Linear or an embedding."""
        there = [part for part in self._parts.get(module, []) if part != "bias"]
        layout = self._method.layout(module, kind, there)
        coded = [part for part in there if part in _CODES]
        weight = f"{module}.weight"
        if (
            layout != DENSE
            and there == ["weight"]
            and self._stored.entries[weight].dtype in FLOATS
            and not self._lost(module)
        ):
            self._told(module, f"isn't quantized, but config.json says {layout.describe()}: name it in ignore")
        elif layout == DENSE and coded:
            self._told(module, f"is quantized ({coded[0]}), but config.json leaves it out")
        else:
            self._layouts[module] = layout
            parts = layout.parts(*shape)
            self._expected |= {f"{module}.{part}": expected for part, expected in parts.items()}

    def _told(self, module: str, problem: str) -> None:
        parts = self._parts[module]
        self._settled |= {f"{module}.{part}" for part in parts if part != "bias"}
        self._report.found(self._stored.place(f"{module}.{parts[0]}"), module, problem, _MEND)

    def _lost(self, module: str) -> bool:
        return any(name.startswith(f"{module}.") for name in self._stored.lost)

    def _plan_cache(self) -> None:
        parts = self._method.cache_parts()
        attentions = dict.fromkeys(name.rpartition(".")[0] for name in self._model.classes if name.endswith(".k_proj"))
        self._expected |= {f"{attention}.{part}": Part(ONE, FLOATS) for attention in attentions for part in parts}

    def _tensor(self, name: str, expected: Part) -> None:
        """One tensor."""
        entry = self._stored.entries.get(name)
        if entry is None:
            module = name.rpartition(".")[0]
            shared = name in self._model.tied or (f"{module}.weight" in self._model.tied and module not in self._parts)
            if not (expected.optional or shared or name in self._stored.lost):
                self._report.found(self._stored.place(name), name, f"is missing ({expected.describe()})")
        elif entry.dtype not in expected.dtypes:
            self._report.found(entry.file, name, f"is {name_of(entry.dtype)}, not {expected.describe()}")
        elif entry.shape not in expected.shapes:
            self._report.found(entry.file, name, f"has the shape {list(entry.shape)}, not {list(expected.shapes[0])}")

    def _extra(self) -> None:
        for name in sorted(self._stored.entries.keys() - self._expected.keys() - self._settled):
            if name in self._model.tied or name.endswith(_LEFTOVERS):
                continue
            self._report.found(self._stored.place(name), name, "is one too many: nothing in the model takes it")

    def _collect(self) -> None:
        """What is sound."""
        sound = {
            name: self._stored.entries[name]
            for name, part in self._expected.items()
            if name in self._stored.entries
            and self._stored.entries[name].dtype in part.dtypes
            and self._stored.entries[name].shape in part.shapes
        }
        for module, layout in self._layouts.items():
            rows, columns = self._model.shapes[f"{module}.weight"]
            wanted = layout.parts(rows, columns)
            there = {part: sound.pop(f"{module}.{part}") for part in wanted if f"{module}.{part}" in sound}
            if all(part in there or expected.optional for part, expected in wanted.items()):
                self._result.modules[module] = Module(module, (rows, columns), layout, there)
        self._result.plain = sound

    def _check_names(self) -> None:
        """Names that config.json gives lead to something."""
        for name in dict.fromkeys(self._method.names()):
            known = name in self._model.modules
            if not known and not any(one == name or one.startswith(f"{name}.") for one in self._model.classes):
                self._report.found(
                    _CONFIG, name, "is named in quantization_config, and the model has no such module", _MEND
                )

    def _check_fused(self) -> None:
        """Linears that run as one are stored in one way."""
        for names in _fused(self._layouts):
            first = names[0]
            differing = [name for name in names if self._layouts[name] != self._layouts[first]]
            if differing:
                one, other = self._layouts[first].describe(), self._layouts[differing[0]].describe()
                self._report.found(
                    _CONFIG,
                    differing[0],
                    f"is {other}, but {first} is {one}, and backends run both as one",
                    "quantize them alike, or none of them",
                )
            self._result.fused.append([self._result.modules[name] for name in names if name in self._result.modules])


def _fused(modules: Mapping[str, Layout]) -> Iterator[Sequence[str]]:
    """Linears that backends run as one; all experts of a block are one, too."""
    experts: dict[str, list[str]] = {}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        for leaves in _FUSED:
            if leaf == leaves[0]:
                found = [f"{parent}.{other}" for other in leaves if f"{parent}.{other}" in modules]
                if len(found) > 1:
                    yield found
        if ".experts." in name:
            experts.setdefault(name.partition(".experts.")[0], []).append(name)
    yield from experts.values()
