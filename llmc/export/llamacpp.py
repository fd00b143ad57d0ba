"""GGUF for llama.cpp: codes go into ggml's blocks as they are, without a second rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from ..quant import PerGroup, QuantSpec, UnitRecord
from .base import Exporter, Layer, Source
from .gguf_blocks import BY_NAME, ZERO, BlockType, find_type
from .gguf_models import architecture_of, limits_of

_RUN = 32


class LlamaCpp(Exporter):
    """One ``model.gguf``: each Linear in the smallest type that holds its grid exactly, the rest as it was.

    A unit's shard holds the blocks of each Linear as uint8 ``[out, bytes]`` under its name and their type
    (``model.layers.0.mlp.down_proj.Q4_0``), and its zero points, which not every type keeps; ``assemble`` orders and
    names them as llama.cpp has them.
    """

    name = "save_llamacpp"
    folder = "llamacpp_quant_model"
    assembled = "model.gguf"
    mixes_schemes = True
    stores_group_index = False
    scale_dtype = torch.float16
    exact_product = True

    def check(self, layers: list[Layer]) -> list[str]:
        """Every grid has a type; llama.cpp rounds activations and cache in ways of its own."""
        if find_spec("gguf") is None:
            raise ExportError("save_llamacpp needs the package gguf", 'install it: pip install "llmc[gguf]"')
        rounding = [scheme for scheme in self.schemes if scheme.act is not None]
        if rounding or self.act is not None:
            act = rounding[0].act if rounding else self.act
            raise ExportError(
                f"save_llamacpp: llama.cpp rounds activations by itself, to 8 bits in runs of 32, not to "
                f"{'' if act is None else act.describe()}",
                "leave quant.act out; or write save_vllm",
            )
        if self.kv is not None:
            raise ExportError(
                f"save_llamacpp: llama.cpp chooses the KV cache's type when it starts (-ctk, -ctv), and has none that "
                f"rounds to {self.kv.describe()}",
                "leave quant.kvcache out; or write save_vllm",
            )
        for layer in layers:
            if layer.spec is not None and find_type(layer.spec, layer.columns) is None:
                raise _unable(layer, layer.spec)
        return []

    def check_source(self, source: Source) -> list[str]:
        """The architecture, each tensor's place in it, and the tokenizer."""
        from .gguf_file import tensor_name
        from .gguf_tokenizer import read_vocabulary

        found, blocks = architecture_of(source.config), int(source.config["num_hidden_layers"])
        homeless = [name for name in source.names if tensor_name(found, blocks, name) is None]
        if homeless:
            raise ExportError(
                f"save_llamacpp: llama.cpp's {found.name} has no tensor for {homeless[0]}",
                "write save_vllm or save_fake",
            )
        vocabulary = read_vocabulary(source.folder, int(source.config["vocab_size"]))
        warnings = limits_of(source.config)
        if not vocabulary.covers_all_bytes:
            warnings.append(
                "save_llamacpp: tokenizer.model has no pieces for single bytes; llama.cpp stops at a character that no "
                "piece has"
            )
        return warnings

    def nbytes(self, layer: Layer) -> int:
        """Blocks and zero points."""
        if layer.spec is None:
            return layer.rows * layer.columns * self.stored.itemsize
        kind = _type_of(layer.spec, layer.columns)
        zeros = 0 if layer.spec.symmetric else math.prod(layer.spec.scale_shape(layer.rows, layer.columns))
        return layer.rows * layer.columns // kind.size * kind.nbytes + zeros

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """Packed blocks, and everything else as it is."""
        stored = dict(unit.plain)
        for name, weight in unit.quantized.items():
            kind = _type_of(weight.spec, weight.codes.shape[1])
            stored[f"{name}.{kind.name}"] = kind.pack(weight)
            if weight.zero is not None:
                stored[f"{name}.{ZERO}"] = weight.zero
        return stored

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """Codes, scales and zero points."""
        quantized, own = {}, set()
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            spec = self.scheme_of(module).weight
            if last in BY_NAME and spec is not None:
                zero = f"{module}.{ZERO}"
                quantized[module] = BY_NAME[last].unpack(tensor, tensors.get(zero), spec)
                own |= {name, zero}
        return UnitRecord({name: tensor for name, tensor in tensors.items() if name not in own}, quantized)

    def independent(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        """The gguf package's reading of the blocks."""
        import gguf

        for key, tensor in tensors.items():
            module, _, last = key.rpartition(".")
            if module == name and last in BY_NAME:
                return torch.from_numpy(gguf.quants.dequantize(tensor.numpy(), gguf.GGMLQuantizationType[last]))
        return None

    def assemble(self, parts: Sequence[Path], source: Source, target: Path) -> int:
        """The file, tensor by tensor."""
        from .gguf_file import write_gguf

        return write_gguf(parts, source, target)

    def config(self, original: dict[str, Any], layers: list[Layer]) -> dict[str, Any]:
        """The original's; llama.cpp doesn't read it."""
        return {key: value for key, value in original.items() if key != "quantization_config"}

    def serve(self, folder: Path) -> str:
        """llama.cpp's server."""
        return f"llama-server -m {folder / self.assembled}"


def _type_of(spec: QuantSpec, columns: int) -> BlockType:
    kind = find_type(spec, columns)
    if kind is None:
        raise ExportError(f"no type of GGUF holds {spec.describe()} exactly", "please report this")
    return kind


def _unable(layer: Layer, spec: QuantSpec) -> ExportError:
    """Why no type holds a grid, and the nearest grid that one does."""
    if spec.grid == "int" and layer.columns % _RUN:
        return ExportError(
            f"save_llamacpp: {layer.name} has {layer.columns} input channels, which GGUF's blocks of 32 don't divide",
            "name it in ignored_layers; or write save_fake",
        )
    nearest = next(near for near in _nearby(spec) if find_type(near, layer.columns) is not None)
    scales = f", scales in {str(spec.scale_dtype).removeprefix('torch.')},"
    return ExportError(
        f"save_llamacpp: no type of GGUF holds {spec.describe()}{scales} exactly ({layer.name})",
        f"the nearest that one holds: {nearest.describe()}, scales in float16; or write save_fake",
    )


def _nearby(spec: QuantSpec) -> list[QuantSpec]:
    """Grids to try instead, nearest first."""
    half = replace(
        spec if spec.grid == "int" else QuantSpec(spec.bits, True, spec.granularity), scale_dtype=torch.float16
    )
    grouped = replace(half, granularity=PerGroup(_RUN))
    return [half, replace(half, symmetric=True), grouped, replace(grouped, symmetric=True)]
