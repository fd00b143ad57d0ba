"""From the public configuration to the small typed options of each part, and what this version can't do yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .algorithms import ALGORITHMS, Ignored, Recipe, make_recipe
from .config import Config
from .config.schema import EvalConfig
from .data import CalibrationSpec, EvaluationSpec
from .errors import ConfigError
from .export import EXPORTERS, Exporter
from .quant import KvSpec, QuantSpec, Sparsity
from .schemes import SCALE_DTYPES, act_spec, unavailable, weight_spec
from .translate_kv import unavailable_cache

_KINDS = {algorithm.name: algorithm.kind for algorithm in ALGORITHMS}


def refuse_unavailable(config: Config) -> None:
    """Refuse what the schema knows but this version doesn't do.

    Raises:
        ConfigError: names the keys, and what is available.
    """
    quant, missing = config.quant, []
    if quant is not None:
        missing += unavailable_cache(quant.kvcache)
        missing += ["quant.mix_bits"] if quant.mix_bits else []
        missing += ["quant.token_reduction"] if quant.token_reduction else []
        missing += unavailable(quant)
    if config.sparse is not None:
        known = config.sparse.method in _KINDS
        missing += [] if known else [f"sparse.method: {config.sparse.method}"]
        missing += ["sparse.kvcache"] if config.sparse.kvcache is not None else []
    missing += ["opencompass"] if config.opencompass is not None else []
    missing += [f"eval type '{one.type}'" for one in config.eval if one.type not in ("ppl", "decode_ppl")]
    available = {exporter.name for exporter in EXPORTERS}
    asked = [name for name, value in config.save if value is True]
    missing += [f"save.{name}" for name in asked if name not in available]
    if missing:
        pruners = ", ".join(name for name, kind in _KINDS.items() if kind == "pruner")
        raise ConfigError(
            f"not available in this version: {', '.join(dict.fromkeys(missing))}",
            "available are weights and activations of 2 to 8 bits or e4m3, e5m2, e2m1, mxfp4, mxfp8, nvfp4, "
            f"the KV cache, pruning by {pruners}, perplexity by prefill and by decoding, "
            f"and {', '.join(sorted(available))}; remove the rest",
        )


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
    if requested in SCALE_DTYPES:
        return SCALE_DTYPES[requested]
    return stored if device.type == "cuda" and stored in SCALE_DTYPES.values() else torch.float32


def make_spec(config: Config, stored: torch.dtype) -> QuantSpec | None:
    """The grid of the weights. Scales are stored in the checkpoint's 16-bit dtype unless the file says otherwise."""
    if config.quant is None or config.quant.weight is None:
        return None
    return weight_spec(config.quant.weight, config.quant.act, stored)


def make_recipe_of(config: Config, spec: QuantSpec | None, kv: KvSpec | None) -> Recipe:
    """The steps of the run; none for a mere evaluation."""
    quant, sparse = config.quant, config.sparse
    if quant is None and sparse is None:
        return Recipe((), None)
    ignored = Ignored(
        layers=frozenset(config.ignored_layers.layer_names),
        blocks=frozenset(config.ignored_layers.block_ids) or None,
        full_names=frozenset(config.ignored_layers.special_names),
    )
    act = None if quant is None or quant.act is None else act_spec(quant.act)
    recipe = make_recipe(
        _methods(config),
        {**(quant.options if quant else {}), **(sparse.options if sparse else {})},
        spec,
        ignored,
        quant_out=quant.quant_out if quant else None,
        seed=config.base.seed,
        sparsity=make_sparsity(config),
        sparsity_out=sparse.sparsity_out if sparse else None,
        act=act,
        kv=kv,
    )
    if recipe.needs_data and config.calib is None:
        asking = [step.algorithm.name for step in recipe.steps if step.algorithm.needs(quant_out=None).data]
        asking += [f"quant.act ({act.describe()})"] if act is not None and act.observer is not None else []
        raise ConfigError(
            f"{asking[0]} needs calibration text, but there is no section 'calib'",
            "add calib with name, n_samples, seq_len and preproc",
        )
    return recipe


def _methods(config: Config) -> list[str]:
    """The methods of both sections in their order: transforms, pruner, quantizer."""
    methods = [] if config.quant is None else list(config.quant.method)
    if misplaced := [name for name in methods if _KINDS[name] == "pruner"]:
        raise ConfigError(
            f"quant.method: {misplaced[0]} prunes, which isn't for the section quant",
            f"write sparse: {{method: {misplaced[0]}, weight: {{sparsity: 0.5}}}} and "
            f"quant.method: {[name for name in methods if _KINDS[name] != 'pruner'] or ['RTN']}, "
            "or no section quant if nothing is to be quantized",
        )
    if config.sparse is not None:
        place = len(methods) - (bool(methods) and _KINDS[methods[-1]] == "quantizer")
        methods.insert(place, config.sparse.method)
    return methods


def make_sparsity(config: Config) -> Sparsity | None:
    """How much is pruned."""
    if config.sparse is None or config.sparse.weight.sparsity is None:
        return None
    weight = config.sparse.weight
    if weight.pattern is None:
        return Sparsity(config.sparse.weight.sparsity)
    zeros, of = map(int, weight.pattern.split(":"))
    return Sparsity(zeros / of, (zeros, of))


def make_exporters(config: Config, recipe: Recipe, stored: torch.dtype, compute: torch.dtype) -> list[Exporter]:
    """The formats that the file asks for."""
    asked = {name for name, value in config.save if value is True}
    if asked and config.quant is None and config.sparse is None:
        raise ConfigError(
            "save: there is nothing to save without a section 'quant' or 'sparse'",
            "add one of them, or remove the save_* keys",
        )
    return [
        kind(recipe.spec, stored, compute, recipe.act or recipe.clustered, recipe.kv)
        for kind in EXPORTERS
        if kind.name in asked
    ]


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
