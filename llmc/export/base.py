"""What an exporter is: pure functions between a unit's record and the tensors that a backend loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..quant import ActSpec, KvSpec, QuantSpec, Scheme, Sparsity, UnitRecord

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".tmp"}
_OURS = {"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"}


@dataclass(frozen=True)
class Layer:
    """A Linear of the model as the exporter's checks see it, before a weight is read.

    Attributes:
        name: the checkpoint's name of the module.
        rows: output channels.
        columns: input channels.
        spec: its grid; None if it isn't quantized.
        fused: the checkpoint names of all Linears that a backend fuses with it (q, k, v; gate, up).
        sparsity: how much of it is pruned; None if nothing is.
        act: the grid of its inputs; None if they stay as they are.
        rotated: order of the Hadamard matrix by which runs of its input are multiplied while the model runs; or None.
        biased: whether it has a bias.
        module: the model's own name of it, where that may differ from the checkpoint's.
        outside: whether it's in none of the (language) blocks.
    """

    name: str
    rows: int
    columns: int
    spec: QuantSpec | None
    fused: tuple[str, ...]
    sparsity: Sparsity | None = None
    act: ActSpec | None = None
    rotated: int | None = None
    biased: bool = False
    module: str = ""
    outside: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint's name and, where it differs, the model's: loaders differ in which of them they look for."""
        return tuple(dict.fromkeys(name for name in (self.name, self.module) if name))

    @property
    def scheme(self) -> Scheme:
        """Both grids."""
        return Scheme(self.spec, self.act)

    def describe(self) -> str:
        """What happens to it, such as ``W8 channel sym, A8 token sym``; empty if nothing does."""
        return ", ".join(part.describe() for part in (self.sparsity, self.spec, self.act) if part is not None)


@dataclass(frozen=True)
class Source:
    """The checkpoint as an exporter needs it beside the weights.

    Attributes:
        folder: holds the tokenizer and ``config.json``.
        config: the (text) model's configuration with all its defaults, as it's stored: with fewer blocks, or a head of
            its own, if the run made it so.
        names: the checkpoint's names of all tensors; empty where they don't matter.
        images: whether the model reads images.
    """

    folder: Path
    config: Mapping[str, Any]
    names: tuple[str, ...] = ()
    images: bool = False


class OwnLayout(Protocol):
    """How the model's own checkpoints hold what records have as Linears ``[out, in]``: views and stacks."""

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """The Linears' tensors in a stored one; None if it is one of theirs, or something else."""
        ...

    def join(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors of a unit, from its Linears' and all others."""
        ...

    def holder(self, name: str) -> str:
        """The stored tensor in which one lies."""
        ...

    def transposes(self, name: str) -> bool:
        """Whether loaders take the weight of the Linear of this name for ``[in, out]``."""
        ...


class Exporter:
    """Base of all formats. A new one is one file with a subclass, listed in ``registry.py``.

    Args:
        spec: the grid of the quantized weights, or None.
        stored: the dtype of the original checkpoint's weights.
        compute: the dtype in which the model was evaluated.
        act: the grid of the quantized Linears' inputs, or None.
        kv: how the KV cache was quantized in the evaluation, or None.
        schemes: those of Linears that have others than ``spec`` and ``act``, by the checkpoint's names.
        fused: for Linears that a backend runs as one with others, by the checkpoint's names, all of those.
        layout: how the model's own checkpoints hold its Linears; None: one by one, ``[out, in]``.
        images: whether the model reads images.
    """

    name: ClassVar[str]
    folder: ClassVar[str]
    stores_weights: ClassVar[bool] = True
    """Whether the model is in it; else it holds what is known about the model."""

    wants_squares: ClassVar[bool] = False
    """Whether it stores the squares of all Linears' inputs on the calibration text."""

    carries_images: ClassVar[bool] = False
    """Whether it also stores a model that reads images, encoder and all."""

    transformed_only: ClassVar[bool] = False
    """Whether it stores the transformed model without quantization."""

    mixes_schemes: ClassVar[bool] = False
    """Whether Linears may have schemes of their own."""

    stores_group_index: ClassVar[bool] = True
    """Whether it can express groups that aren't runs of consecutive columns."""

    scale_dtype: ClassVar[torch.dtype | None] = None
    """The dtype of packed integers' scales in this format; None: any. Codes are computed with scales in it."""

    stores_codes: ClassVar[bool] = True
    """Whether it stores codes, which its backend multiplies with the scales; else it stores the products."""

    exact_product: ClassVar[bool] = False
    """Whether its backend multiplies them in float32, whatever the scales' dtype."""

    assembled: ClassVar[str | None] = None
    """The file that ``assemble`` makes of all units' shards, which are then only parts; None: they are the output."""

    runs_rotations: ClassVar[bool] = False
    """Whether its backend can rotate the input of a Linear while it runs; ``check`` says which."""

    model_types: ClassVar[frozenset[str] | None] = None
    """Architectures that its backend converts (``model_type`` of ``config.json``); None: no such limit is known."""

    def __init__(
        self,
        spec: QuantSpec | None,
        stored: torch.dtype,
        compute: torch.dtype,
        act: ActSpec | None = None,
        kv: KvSpec | None = None,
        schemes: Mapping[str, Scheme] | None = None,
        fused: Mapping[str, tuple[str, ...]] | None = None,
        layout: OwnLayout | None = None,
        images: bool = False,
    ) -> None:
        self.spec, self.stored, self.compute, self.act, self.kv = spec, stored, compute, act, kv
        self.images = images
        self._schemes = dict(schemes or {})
        self._fused = dict(fused or {})
        self._layout = layout

    def fused_with(self, name: str) -> tuple[str, ...]:
        """All Linears that a backend runs as one with this one, itself among them."""
        return self._fused.get(name, (name,))

    def scheme_of(self, name: str) -> Scheme:
        """The grids of a Linear that isn't ignored, by the checkpoint's name."""
        return self._schemes.get(name) or Scheme(self.spec, None if self.spec is None else self.act)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All that Linears may have, each once."""
        own = Scheme(self.spec, None if self.spec is None else self.act)
        return tuple(scheme for scheme in dict.fromkeys((own, *self._schemes.values())) if scheme.weight is not None)

    def check(self, layers: list[Layer]) -> list[str]:
        """Refuse what the backend can't load, before any weight is read.

        Returns:
            Warnings: what it loads only under a condition.

        Raises:
            ExportError: names the layer, the rule, and what could be done.
        """
        return []

    def check_source(self, source: Source) -> list[str]:
        """Refuse a checkpoint (architecture, tokenizer) that the backend can't load, before any weight is read.

        Returns:
            Warnings: what it loads only under a condition.

        Raises:
            ExportError: says why, and what could be done.
        """
        return []

    def assemble(self, parts: Sequence[Path], source: Source, target: Path) -> int:
        """Write the one file of formats that have an ``assembled``, from the shards of all units in their order.

        Returns:
            The number of its tensors.
        """
        raise NotImplementedError

    def nbytes(self, layer: Layer) -> int:
        """Bytes that a Linear's weight will take."""
        raise NotImplementedError

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """Stored tensors of a unit, by name."""
        raise NotImplementedError

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """The inverse of ``tensors``: what a resumed run and the check after writing rely on."""
        raise NotImplementedError

    def parts(self, name: str, stored: Collection[str]) -> list[str]:
        """Those of the stored names whose tensors hold a Linear's weight, and what belongs to it."""
        return [other for other in stored if other.startswith(f"{name}.")]

    def independent(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        """The dense weight ``name`` as somebody else's reader sees it; None where there is no other reader."""
        return None

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """Content of ``config.json``, given the original's."""
        raise NotImplementedError

    def extra_files(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """JSON files beside ``config.json`` by their names, given the original's configuration."""
        return {}

    def serve(self, folder: Path) -> str:
        """The command or code that loads the folder."""
        raise NotImplementedError


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy all but weights and ``config.json`` byte for byte: tokenizer, templates, generation settings, code."""
    copied = []
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS and path.name not in _OURS:
            part = target / f"{path.name}.tmp"  # a folder that is loadable already never holds half a file
            shutil.copyfile(path, part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(target / path.name)
            copied.append(path.name)
    return copied


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as plain values."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content


def with_own_head(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose head doesn't share the embedding's weights."""
    inner = config.get("text_config")
    nested = {"text_config": with_own_head(inner)} if isinstance(inner, dict) else {}
    return {**config, **nested, "tie_word_embeddings": False}


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint whose weights were decoded."""
    inner = config.get("text_config")
    nested = {"text_config": without_quantization(inner)} if isinstance(inner, dict) else {}
    return {key: value for key, value in {**config, **nested}.items() if key != "quantization_config"}


def with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The configuration with another weight dtype, under whichever of its two names it has."""
    name = str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**{k: v for k, v in config.items() if k != "quantization_config"}, key: name}
