"""From the public configuration to the small typed options of each part, and what this version can't do yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .algorithms import Ignored, Recipe, make_recipe
from .config import Config
from .config.schema import EvalConfig
from .data import CalibrationSpec, EvaluationSpec
from .errors import ConfigError
from .export import EXPORTERS, Exporter
from .quant import Granularity, KvSpec, MinMax, Mse, PerChannel, PerGroup, PerTensor, QuantSpec
from .translate_kv import unavailable_cache

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def refuse_unavailable(config: Config) -> None:
    """Refuse what the schema knows but this version doesn't do.

    Raises:
        ConfigError: names the keys, and what is available.
    """
    quant, missing = config.quant, []
    if quant is not None:
        missing += ["quant.act"] if quant.act is not None else []
        missing += unavailable_cache(quant.kvcache)
        missing += ["quant.mix_bits"] if quant.mix_bits else []
        missing += ["quant.token_reduction"] if quant.token_reduction else []
        missing += _unavailable_weight(quant.weight)
    missing += ["sparse"] if config.sparse is not None else []
    missing += ["opencompass"] if config.opencompass is not None else []
    missing += [f"eval type '{one.type}'" for one in config.eval if one.type not in ("ppl", "decode_ppl")]
    available = {exporter.name for exporter in EXPORTERS}
    asked = [name for name, value in config.save if value is True]
    missing += [f"save.{name}" for name in asked if name not in available]
    if missing:
        raise ConfigError(
            f"not available in this version: {', '.join(dict.fromkeys(missing))}",
            "available are integer weights (2 to 8 bits), the KV cache, perplexity by prefill and by decoding, "
            f"and {', '.join(sorted(available))}; remove the rest",
        )


def _unavailable_weight(weight: object) -> list[str]:
    from .config.schema import WeightConfig

    if not isinstance(weight, WeightConfig):
        return []
    missing = []
    if weight.quant_type == "float-quant" or not isinstance(weight.bit, int) or weight.bit > 8:
        missing.append(f"quant.weight.bit: {weight.bit}")
    if weight.granularity not in ("per_tensor", "per_channel", "per_group"):
        missing.append(f"quant.weight.granularity: {weight.granularity}")
    if weight.calib_algo not in ("minmax", "mse"):
        missing.append(f"quant.weight.calib_algo: {weight.calib_algo}")
    missing += ["quant.weight.int_range"] if weight.int_range is not None else []
    missing += ["quant.weight.round_zp: False"] if not weight.round_zp else []
    return missing


def make_device(requested: str) -> torch.device:
    """``base.device``; ``auto`` is the first CUDA device, else the CPU."""
    if requested == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(requested)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"base.device: {requested}: there is no such device here", "use auto or cpu")
    return device


def make_compute_dtype(requested: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """``model.torch_dtype``; ``auto`` is the checkpoint's on a GPU, and float32 on a CPU, which is fastest in it."""
    if requested == "float8_e4m3fn":
        raise ConfigError("model.torch_dtype: float8_e4m3fn isn't available in this version", "use auto or bfloat16")
    if requested in _DTYPES:
        return _DTYPES[requested]
    return stored if device.type == "cuda" and stored in _DTYPES.values() else torch.float32


def make_spec(config: Config, stored: torch.dtype) -> QuantSpec | None:
    """The grid of the weights. Scales are stored in the checkpoint's 16-bit dtype unless the file says otherwise."""
    if config.quant is None or config.quant.weight is None:
        return None
    weight = config.quant.weight
    granularity: Granularity
    if weight.granularity == "per_group":
        granularity = PerGroup(int(weight.group_size or 0))
    else:
        granularity = PerTensor() if weight.granularity == "per_tensor" else PerChannel()
    automatic = stored if stored in (torch.bfloat16, torch.float16) else torch.float16
    return QuantSpec(
        bits=int(weight.bit),
        symmetric=weight.symmetric,
        granularity=granularity,
        sym_mode=weight.sym_mode,
        ranges=Mse(weight.maxshrink, weight.mse_grid) if weight.calib_algo == "mse" else MinMax(),
        scale_dtype=_DTYPES.get(weight.scale_dtype, automatic),
    )


def make_recipe_of(config: Config, spec: QuantSpec | None, kv: KvSpec | None) -> Recipe:
    """The steps of the run; none for a mere evaluation."""
    if config.quant is None:
        return Recipe((), None)
    ignored = Ignored(
        layers=frozenset(config.ignored_layers.layer_names),
        blocks=frozenset(config.ignored_layers.block_ids) or None,
        full_names=frozenset(config.ignored_layers.special_names),
    )
    quant = config.quant
    recipe = make_recipe(quant.method, quant.options, spec, ignored, quant_out=quant.quant_out, kv=kv)
    if recipe.needs_data and config.calib is None:
        names = [step.algorithm.name for step in recipe.steps if step.needs.data]
        raise ConfigError(
            f"{names[0]} needs calibration text, but there is no section 'calib'",
            "add calib with name, n_samples, seq_len and preproc",
        )
    return recipe


def make_exporters(config: Config, recipe: Recipe, stored: torch.dtype, compute: torch.dtype) -> list[Exporter]:
    """The formats that the file asks for."""
    asked = {name for name, value in config.save if value is True}
    if asked and config.quant is None:
        raise ConfigError(
            "save: there is nothing to save without a section 'quant'", "add quant, or remove the save_* keys"
        )
    return [kind(recipe.spec, stored, compute, recipe.kv) for kind in EXPORTERS if kind.name in asked]


def calibration_spec(config: Config) -> CalibrationSpec | None:
    """What to calibrate on."""
    calib = config.calib
    if calib is None:
        return None
    return CalibrationSpec(
        name=calib.name,
        path=calib.path,
        download=calib.download,
        n_samples=calib.n_samples,
        seq_len=calib.seq_len,
        preproc=calib.preproc or "original_txt",
        seed=calib.seed,
        text_field=calib.text_field,
        apply_chat_template=calib.apply_chat_template,
    )


def evaluation_spec(one: EvalConfig) -> EvaluationSpec:
    """Which windows an evaluation is done on. ``num_samples`` and ``num_eval_tokens`` belong to ``decode_ppl``."""
    decodes = one.type == "decode_ppl"
    limits = [limit for limit in (one.num_chunks, one.num_samples if decodes else None) if limit is not None]
    length = one.seq_len or (one.num_eval_tokens if decodes else None) or 0
    chunks, first = min(limits, default=None), one.num_eval_tokens if decodes else None
    return EvaluationSpec(one.name, one.path, one.download, length, chunks, one.protocol, one.text_field, first)


def batched(samples: Sequence[Tensor], size: int) -> list[Tensor]:
    """Stack 1-D token samples into batches ``[<= size, tokens]``; only neighbours of one length go together."""
    batches: list[list[Tensor]] = []
    for sample in samples:
        last = batches[-1] if batches else []
        if last and len(last[0]) == len(sample) and (size < 0 or len(last) < size):
            last.append(sample)
        else:
            batches.append([sample])
    return [torch.stack(batch) for batch in batches]
