"""From the sections ``quant.weight``, ``quant.act`` and ``quant.mix_bits`` to the grids of weights and activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .algorithms import ALGORITHMS, LayerPattern, Rule
from .config.places import layer_place
from .config.schema import QuantConfig
from .config.tensors import ActConfig, MixSetting, TensorConfig, WeightConfig
from .errors import ConfigError
from .quant import (
    ActSpec,
    Granularity,
    Grid,
    HistogramMse,
    MinMax,
    MovingMinMax,
    Mse,
    Observer,
    PerBlock,
    PerChannel,
    PerCluster,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    Scheme,
    StaticMinMax,
)

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_GRIDS: dict[int | str, Grid] = {
    "e4m3": "e4m3",
    "e5m2": "e5m2",
    "e2m1": "e2m1",
    "mxfp4": "e2m1",
    "mxfp8": "e4m3",
    "nvfp4": "e2m1",
}
_MICRO_SCALES = {"mxfp4": torch.float8_e8m0fnu, "mxfp8": torch.float8_e8m0fnu, "nvfp4": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Packing:
    """How the formats to be saved store packed, weight-only integers.

    Attributes:
        scale_dtype: the dtype of their scales, if the file doesn't set it.
        exact_product: whether codes and scales are multiplied in float32.
    """

    scale_dtype: torch.dtype
    exact_product: bool = False


def make_packing(
    stored: torch.dtype, wanted: Mapping[str, torch.dtype], exact: Mapping[str, bool] | None = None
) -> Packing:
    """How all formats to be saved can store packed integers.

    Args:
        stored: the dtype of the checkpoint's weights; without other wishes, theirs if it has 16 bits.
        wanted: the dtype that each asked format stores, where it stores but one.
        exact: of each asked format that stores codes, whether its backend multiplies them in float32.

    Raises:
        ConfigError: two formats want different ones.
    """
    dtypes = list(dict.fromkeys(wanted.values()))
    if len(dtypes) > 1:
        pair = " and ".join(f"{name} in {str(dtype).removeprefix('torch.')}" for name, dtype in wanted.items())
        raise ConfigError(f"save: scales are stored by {pair}, and they are rounded once", "save them in two runs")
    exact = exact or {}
    if len(set(exact.values())) > 1:
        whole = [name for name, asked in exact.items() if asked]
        others = [name for name, asked in exact.items() if not asked]
        raise ConfigError(
            f"save: {whole[0]}'s backend multiplies codes and scales in float32, {others[0]}'s in the scales' dtype, "
            "and one of the two products is evaluated",
            "save them in two runs",
        )
    narrow = stored if stored in (torch.bfloat16, torch.float16) else torch.float16
    return Packing(dtypes[0] if dtypes else narrow, any(exact.values()))


def weight_spec(weight: WeightConfig, act: ActConfig | None, packing: Packing) -> QuantSpec:
    """The grid of the weights.

    Without another wish, the scales of weights that are multiplied as integers or as FP8 are float32, as vLLM has them;
    those of packed integers are stored as ``packing`` says: weights alone, and 4-bit ones with activations of 8 bits.
    """
    automatic = packing.scale_dtype if _is_packed(weight, act) else torch.float32
    ranges = Mse(weight.maxshrink, weight.mse_grid) if weight.calib_algo == "mse" else MinMax()
    scale_dtype = _MICRO_SCALES.get(str(weight.bit)) or SCALE_DTYPES.get(weight.scale_dtype, automatic)
    granularity = _granularity(weight)
    if isinstance(weight.bit, str):
        return QuantSpec.floating(_GRIDS[weight.bit], granularity, scale_dtype, ranges)
    return QuantSpec(
        weight.bit,
        weight.symmetric,
        granularity,
        weight.sym_mode,
        ranges,
        scale_dtype,
        exact_product=packing.exact_product,
        scale_digits=weight.scale_digits,
    )


def _is_packed(weight: WeightConfig, act: ActConfig | None) -> bool:
    """Whether backends keep the scales of integer weights in the model's dtype."""
    if weight.quant_type != "int-quant":
        return False
    return act is None or (
        weight.bit == 4 and act.bit in (8, "e4m3") and act.granularity in ("per_token", "per_tensor")
    )


def act_spec(act: ActConfig) -> ActSpec:
    """The grid of the activations. Its scales are float32, and 127 is the largest symmetric code, as in vLLM."""
    if isinstance(act.bit, str):
        scale_dtype = _MICRO_SCALES.get(act.bit, torch.float32)
        grid = QuantSpec.floating(_GRIDS[act.bit], _granularity(act), scale_dtype)
    else:
        grid = QuantSpec(act.bit, act.symmetric, _granularity(act))
    observed = (act.static and act.granularity != "per_cluster") or grid.is_nvfp4
    return ActSpec(grid, _observer(act) if observed else None)


def _granularity(tensor: TensorConfig) -> Granularity:
    shared = tensor.granularity
    if shared == "per_group":
        return PerGroup(int(tensor.group_size or 0))
    if isinstance(tensor, WeightConfig) and shared == "per_block":
        return PerBlock(int(tensor.block_size or 0))
    kinds: dict[str, Granularity] = {
        "per_tensor": PerTensor(),
        "per_channel": PerChannel(),
        "per_token": PerToken(),
        "per_cluster": PerCluster(),
    }
    return kinds[shared]


def _observer(act: ActConfig) -> Observer:
    if act.calib_algo == "static_hist":
        return HistogramMse(act.bins)
    return MovingMinMax() if act.calib_algo == "static_moving_minmax" else StaticMinMax()


def make_rules(quant: QuantConfig, packing: Packing) -> tuple[Rule, ...]:
    """The settings of ``quant.mix_bits`` in their order."""
    return tuple(_rule(f"quant.mix_bits.{name}", setting, packing) for name, setting in quant.mix_bits.items())


def _rule(key: str, setting: MixSetting, packing: Packing) -> Rule:
    places = {text: layer_place(text) for text in setting.layer_name}
    patterns = tuple(LayerPattern(text, place.name, place.blocks) for text, place in places.items())
    if not setting.do_quant or setting.weight is None:
        return Rule(key, patterns, Scheme())
    act = None if setting.act is None else act_spec(setting.act)
    return Rule(key, patterns, Scheme(weight_spec(setting.weight, setting.act, packing), act))


def unavailable(quant: QuantConfig) -> list[str]:
    """Keys of weights and activations that the schema knows and this version doesn't do."""
    sections = {"quant": (quant.weight, quant.act)}
    sections |= {f"quant.mix_bits.{name}": (one.weight, one.act) for name, one in quant.mix_bits.items()}
    learned = any(algorithm.learns for algorithm in ALGORITHMS if algorithm.name in quant.method)
    return [key for section, pair in sections.items() for key in _unavailable_pair(section, *pair, learned=learned)]


def _unavailable_pair(section: str, weight: WeightConfig | None, act: ActConfig | None, *, learned: bool) -> list[str]:
    missing = []
    if weight is not None:
        granularities = ("per_tensor", "per_channel", "per_group", "per_block", "per_cluster")
        missing += _unavailable(f"{section}.weight", weight, granularities)
        if weight.calib_algo not in ("minmax", "mse") and not (learned and weight.calib_algo == "learnable"):
            missing.append(f"{section}.weight.calib_algo: {weight.calib_algo}")
    if act is not None:
        missing += _unavailable(f"{section}.act", act, ("per_tensor", "per_token", "per_group", "per_cluster"))
        further = {"quant_attn": act.quant_attn, "quant_softmax": act.quant_softmax, "quant_act_fn": act.quant_act_fn}
        missing += [f"{section}.act.{key}" for key, asked in further.items() if asked]
    return missing


def _unavailable(key: str, tensor: TensorConfig, granularities: tuple[str, ...]) -> list[str]:
    floating = isinstance(tensor.bit, str)
    missing = []
    if tensor.bit not in _GRIDS and (floating or int(tensor.bit) > 8):
        missing.append(f"{key}.bit: {tensor.bit}")
    if tensor.granularity not in granularities:
        missing.append(f"{key}.granularity: {tensor.granularity}")
    missing += [f"{key}.int_range"] if tensor.int_range is not None else []
    missing += [f"{key}.float_range"] if tensor.float_range is not None else []
    missing += [f"{key}.round_zp: False"] if not tensor.round_zp else []
    return missing
