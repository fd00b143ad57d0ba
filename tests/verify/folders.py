"""Folders to verify, made quickly from a tiny checkpoint, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmc.export import Exporter, Layer, read_config
from llmc.export.dense import FakeQuant
from llmc.export.vllm import VLLM
from llmc.quant import ActSpec, InputRange, QuantSpec, UnitRecord, quantize_weight

INDEX = "model.safetensors.index.json"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def linears_of(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shards: int = 3) -> Path:
    """Shards with an index, side files, and ``config.json``."""
    folder.mkdir(parents=True)
    names, place = list(tensors), {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        own = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        save_file({name: tensors[name].contiguous() for name in own}, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(own, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Export:
    """A folder for vLLM, its fake-quantized twin, and the checkpoint that both come from."""

    vllm: Path
    fake: Path
    original: Path


def export(source: Path, target: Path, spec: QuantSpec, act: ActSpec | None = None, ignored: str = "-") -> Export:
    """Round every Linear to nearest and store it by the exporters, as a run would."""
    tensors = tensors_of(source)
    linears = [name for name in linears_of(tensors) if ignored not in name]
    static = act is not None and act.observer is not None
    record = UnitRecord(
        plain={name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in linears},
        quantized={name: quantize_weight(tensors[f"{name}.weight"], spec) for name in linears},
        inputs=dict.fromkeys(linears, InputRange(-2.0, 3.0)) if static else {},
    )
    layers = [_layer(name, tensors, spec if name in linears else None, act) for name in linears_of(tensors)]
    made = []
    for kind in (VLLM, FakeQuant):
        exporter: Exporter = kind(spec, torch.bfloat16, torch.float32, act)
        config = exporter.config(read_config(source), layers)
        made.append(write_folder(target / kind.folder, exporter.tensors(record), config))
    original = write_folder(target / "original", tensors, read_config(source))
    return Export(*made, original)


def _layer(name: str, tensors: Mapping[str, Tensor], spec: QuantSpec | None, act: ActSpec | None) -> Layer:
    parent, _, leaf = name.rpartition(".")
    fused = next((leaves for leaves in FUSED if leaf in leaves), (leaf,))
    rows, columns = tensors[f"{name}.weight"].shape
    names = tuple(f"{parent}.{one}" for one in fused)
    return Layer(name, rows, columns, spec, names, act=act if spec is not None else None)


# --- damage --------------------------------------------------------------------------------------------------------


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change(folder: Path, name: str, how: Callable[[Tensor], Tensor | None]) -> None:
    """Replace a tensor; None removes it from its shard."""
    file = shard_of(folder, name)
    tensors = load_file(file)
    changed = how(tensors.pop(name).clone())
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def swap(folder: Path, one: str, other: str) -> None:
    """Exchange the values of two tensors."""
    tensors = tensors_of(folder)
    change(folder, one, lambda tensor: tensors[other])
    change(folder, other, lambda tensor: tensors[one])


def add(folder: Path, name: str, tensor: Tensor, shard: int = 0) -> None:
    """A further tensor, in the index too."""
    file = sorted(folder.glob("*.safetensors"))[shard]
    save_file({**load_file(file), name: tensor}, file, metadata={"format": "pt"})
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: file.name}))


def edit_json(file: Path, how: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


def flip(folder: Path, name: str, byte: int = 0, bit: int = 0) -> None:
    """Flip one bit of a tensor on the disk."""

    def flipped(tensor: Tensor) -> Tensor:
        raw = tensor.contiguous().view(torch.uint8).reshape(-1)
        raw[byte] = int(raw[byte]) ^ (1 << bit)
        return raw.view(tensor.dtype).reshape(tensor.shape)

    change(folder, name, flipped)
