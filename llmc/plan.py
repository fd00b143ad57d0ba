"""What a run will do and need, computed from the configuration and the checkpoint's headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import nn

from .algorithms import LayerPattern, Online, Recipe
from .config.suggest import did_you_mean
from .errors import ConfigError, ModelError
from .export import Exporter, Layer
from .models import Heads, Subset
from .quant import PerGroup, QuantSpec
from .report.experts import collapsed
from .stream.decoding import Checkpoint, Entry
from .stream.skeleton import HEAD, Skeleton, block_unit

_RUNTIME = 450 * 2**20  # Python, torch and transformers themselves
_COMMON_GROUPS = (32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Estimate:
    """Bytes a run will take, roughly.

    Attributes:
        read: from the checkpoint.
        disk: written under ``save_path``, activation checkpoints included.
        held: activations that a block holds while its batches wait for one another.
        streams: activations between blocks.
        host: peak of the host's memory.
        device: peak of the device's memory; 0 where the host is the device.
    """

    read: int
    disk: int
    held: int
    streams: int
    host: int
    device: int


def make_layers(
    skeleton: Skeleton,
    entries: Mapping[str, Entry],
    heads: Heads,
    subsets: Sequence[tuple[Subset, ...]],
    recipe: Recipe,
    online: Online | None = None,
) -> list[Layer]:
    """Every Linear of every block with its grid, and what rotates its input while the model runs.

    Raises:
        ModelError: the adapter names a Linear that a block doesn't have.
        ConfigError: a group size or a run of ``sparse.weight.pattern`` doesn't divide a layer's input channels,
            ``ignored_layers`` or a ``layer_name`` matches nothing, or Linears that share an input round it differently.
    """
    stored = {parameter: name for name, parameter in skeleton.parameter_of.items()}
    prefix = next(name for name, module in skeleton.model.named_modules() if module is skeleton.blocks)
    layers, touched = [], False
    for index in range(len(skeleton.blocks)):
        for subset in subsets[index]:
            names = {}
            for name in subset.linears:
                parameter = f"{prefix}.{index}.{name}.weight"
                if parameter not in stored:
                    raise ModelError(f"block {index} has no Linear '{name}'", "the adapter doesn't fit this model")
                names[name] = stored[parameter].removesuffix(".weight")
            for name, full in names.items():
                rows, columns = entries[f"{full}.weight"].shape
                place = (index, name, f"{prefix}.{index}.{name}")
                touched |= recipe.ignored.covers(*place)
                scheme, sparsity = recipe.scheme_of(*place), recipe.sparsity_of(*place)
                scheme = recipe.bound_scheme(scheme, subset, heads)
                rotation = None if online is None else online.of_input(subset)
                rotated = None if rotation is None else rotation.basis.order
                biased = f"{full}.bias" in entries
                fused = tuple(names[other] for other in subset.fused_with(name))
                layers.append(
                    Layer(full, rows, columns, scheme.weight, fused, sparsity, scheme.act, rotated, biased, place[2])
                )
            _check_shared_input(layers[-len(names) :])
    every = dict.fromkeys(name for own in subsets for subset in own for name in subset.linears)
    _check_rules(recipe, len(skeleton.blocks), list(every))
    _check_groups(layers, recipe)
    _check_runs(layers)
    if recipe.steps and recipe.ignored.asked and not touched:
        raise ConfigError(
            "ignored_layers matches no layer of this model", "names look like mlp.down_proj; --dry-run lists them"
        )
    return layers


def outside_layers(skeleton: Skeleton, entries: Mapping[str, Entry], encoder: Sequence[Layer] = ()) -> list[Layer]:
    """Every Linear of a model with an encoder that is in none of its language blocks: but for those of the encoder's
    blocks, where these are compressed, they stay as they are, and a format must say so. Of a model without an encoder
    there is none to speak of but the head, which no format quantizes."""
    if skeleton.images is None:
        return []
    compressed = {layer.name: replace(layer, outside=True) for layer in encoder}
    stored = {parameter: name for name, parameter in skeleton.parameter_of.items()}
    layers = []
    for module, linear in skeleton.model.named_modules():
        tensor = stored.get(f"{module}.weight")
        if isinstance(linear, nn.Linear) and tensor is not None and not module.startswith(f"{skeleton.path}."):
            name, (rows, columns) = tensor.removesuffix(".weight"), entries[tensor].shape
            kept = Layer(name, rows, columns, None, (name,), module=module, outside=True)
            layers.append(compressed.get(name, kept))
    return layers


def _check_shared_input(layers: list[Layer]) -> None:
    """Refuse Linears that read the same tensor and want it rounded in different ways: it's rounded once."""
    rounding = [layer for layer in layers if layer.act is not None]
    for layer in rounding[1:]:
        if layer.act != rounding[0].act:
            one, other = (f"{each.name} ({each.describe()})" for each in (rounding[0], layer))
            raise ConfigError(
                f"quant.mix_bits: {one} and {other} read the same input, which can't be rounded in two ways",
                "give them the same act section, or none to one of them",
            )


def _check_rules(recipe: Recipe, blocks: int, names: list[str]) -> None:
    """Refuse a ``layer_name`` that no Linear of a block has, or a block that isn't there."""
    for rule in recipe.rules:
        for pattern in rule.patterns:
            where = f"{rule.key}.layer_name: {pattern.text!r}"
            if not any(pattern.names(name) for name in names):
                short = [name.rpartition(".")[2] for name in names]
                raise ConfigError(
                    f"{where} matches no layer of this model{did_you_mean(pattern.name, [*names, *short])}",
                    f"the layers of a block: {', '.join(collapsed(names))}",
                )
            _check_blocks(where, pattern, blocks)


def _check_blocks(where: str, pattern: LayerPattern, blocks: int) -> None:
    beyond = sorted(block for block in pattern.blocks or () if block >= blocks)
    if beyond:
        raise ConfigError(
            f"{where}: there is no block {beyond[0]}, the model has blocks 0 to {blocks - 1}", "mend the numbers"
        )


def _check_groups(layers: list[Layer], recipe: Recipe) -> None:
    """Refuse groups of weights or activations that don't divide a layer's input channels."""
    keys = {recipe.scheme: "quant"} | {rule.scheme: rule.key for rule in recipe.rules}
    quantized = [layer for layer in layers if layer.spec is not None]
    for layer in quantized:
        grids = {"weight": layer.spec, "act": None if layer.act is None else layer.act.grid}
        for section, grid in grids.items():
            if grid is None or not isinstance(grid.granularity, PerGroup) or not layer.columns % grid.granularity.size:
                continue
            key = f"{keys[layer.scheme]}.{section}.group_size"
            columns = {other.columns for other in quantized}
            fitting = [size for size in _COMMON_GROUPS if all(count % size == 0 for count in columns)]
            raise ConfigError(
                f"{key}: {grid.granularity.size} doesn't divide the {layer.columns} input channels of {layer.name}",
                f"sizes that divide every layer: {', '.join(map(str, fitting)) or 'none of the usual ones'}; or use "
                f"granularity: {'per_channel' if section == 'weight' else 'per_token'}, or name the layer in "
                "ignored_layers",
            )


def _check_runs(layers: list[Layer]) -> None:
    for layer in layers:
        if layer.sparsity is not None and layer.sparsity.pattern is not None:
            zeros, of = layer.sparsity.pattern
            if layer.columns % of:
                raise ConfigError(
                    f"sparse.weight.pattern: runs of {of} don't divide the {layer.columns} input channels of "
                    f"{layer.name}",
                    f"leave pattern out: sparsity {zeros / of:g} may be anywhere; or choose another, such as '2:4'",
                )


def bits_per_weight(layers: list[Layer]) -> float | None:
    """Mean over the quantized weights, scales and zero points included."""
    weights = bits = 0.0
    for layer in layers:
        if layer.spec is not None:
            weights += layer.rows * layer.columns
            bits += layer_bits(layer, layer.spec)
    return bits / weights if weights else None


def layer_bits(layer: Layer, spec: QuantSpec) -> float:
    """Bits of a layer's codes, scales and zero points."""
    return spec.stored_bits(layer.rows * layer.columns, math.prod(spec.scale_shape(layer.rows, layer.columns)))


def make_estimate(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    layers: list[Layer],
    exporters: list[Exporter],
    *,
    calib_tokens: int,
    eval_tokens: int,
    streams: tuple[int, int],
    on_device: bool,
    changed_at_load: bool = False,
    surveyed: bool = False,
) -> Estimate:
    """Peaks and totals. ``streams`` counts the calibration and evaluation streams.

    A model that is ``surveyed`` first is read twice, less its head, with a stream of its own; which blocks will be
    dropped isn't known yet. A model that is ``changed_at_load`` holds a Linear in float64 twice, and gets a head of its
    own if that was tied.
    """
    width = skeleton.model.config.get_text_config().hidden_size
    size, entries = skeleton.model.dtype.itemsize, checkpoint.entries
    stored_bytes = {unit: sum(entry.nbytes for entry in own) for unit, own in checkpoint.units(skeleton.units).items()}
    unit_bytes = {unit: sum(entries[name].nbytes for name in names) for unit, names in skeleton.units.items()}
    elements = {
        unit: sum(entries[name].nbytes // entries[name].dtype.itemsize for name in names)
        for unit, names in skeleton.units.items()
    }
    total = sum(stored_bytes.values())
    read = total + (total - stored_bytes[HEAD] if surveyed else 0)
    kept = max(calib_tokens * streams[0] + eval_tokens * streams[1], calib_tokens * surveyed) * width * size
    widest = max((layer.columns for layer in layers if not layer.outside), default=width)
    held = calib_tokens * (3 * width + widest) * size if streams[0] else 0
    block = largest_block(skeleton, entries)
    loaded = max(unit_bytes.values()) + max(stored_bytes.values())  # one unit decoded, or being decoded, the next read
    gram = 3 * widest * widest * 4 if streams[0] else 0
    exact = 2 * 8 * max((layer.rows * layer.columns for layer in layers), default=0) if changed_at_load else 0
    untied = unit_bytes["embed"] if changed_at_load and skeleton.tied_head else 0
    working = max(block, elements[HEAD] * size, elements["embed"] * size) + max(gram + held, exact) + untied
    weights = {f"{layer.name}.weight" for layer in layers}
    plain = sum(entry.nbytes for name, entry in entries.items() if name not in weights)
    written = sum(
        (exporter.stores_weights * (plain + untied) + sum(exporter.nbytes(layer) for layer in layers))
        * (2 if exporter.assembled else 1)
        for exporter in exporters
    )
    host = _RUNTIME + loaded + kept + (0 if on_device else working)
    return Estimate(read, written + 2 * kept, held, kept, host, working if on_device else 0)


def largest_block(skeleton: Skeleton, entries: Mapping[str, Entry]) -> int:
    """Bytes of the largest block's weights in the computing dtype."""
    size: int = skeleton.model.dtype.itemsize
    units = (skeleton.units[block_unit(index)] for index in range(len(skeleton.blocks)))
    return size * max(sum(math.prod(entries[name].shape) for name in names) for names in units)


def stored_dtype(entries: Mapping[str, Entry], layers: list[Layer]) -> torch.dtype:
    """The dtype of the checkpoint's Linear weights."""
    return entries[f"{layers[0].name}.weight"].dtype


def original_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors of the checkpoint, as they are stored."""
    return sum(entry.nbytes for entry in checkpoint.stored.values())


def forward_of(
    asked: Literal["auto", "staged", "replay"], held: int, device: torch.device
) -> Literal["staged", "replay"]:
    """``base.forward``; ``auto`` holds all batches inside a block if the bytes that they hold fit into half of the free
    memory."""
    if asked != "auto":
        return asked
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return "staged" if held <= free // 2 else "replay"


def free_disk(path: Path) -> int:
    """Free bytes on the disk that will hold ``path``."""
    import shutil

    existing = path
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
