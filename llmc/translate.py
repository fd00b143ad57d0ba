"""From the public configuration to the small typed options of each part, and what this version can't do yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .algorithms import (
    ALGORITHMS,
    SHORTGPT,
    Algorithm,
    ExpertCalibration,
    Ignored,
    Recipe,
    is_named,
    make_recipe,
)
from .config import Config
from .config.schema import CalibConfig, EvalConfig
from .config.suggest import did_you_mean
from .data import CalibrationSpec, EvaluationSpec, ImageTextSpec
from .errors import ConfigError, ExportError
from .export import EXPORTERS, Exporter, Layer
from .models import Subset
from .models.layouts import StoredLayout
from .quant import KvSpec, Scheme, Sparsity
from .schemes import SCALE_DTYPES, Packing, act_spec, make_packing, make_rules, unavailable, weight_spec
from .translate_kv import unavailable_cache

IMAGE_TEXT = "custom_mm"
"""The name of calibration data with images."""

_KINDS = {algorithm.name: algorithm.kind for algorithm in ALGORITHMS} | {SHORTGPT: "pruner"}
_ELSEWHERE = {
    "acc": ("it counts how many images are told right, and this compresses language models", "remove it"),
    "vqa": ("questions about images are asked by lmms-eval", "serve save.save_vllm's folder, and ask that server"),
    "code": (
        "lm-eval has the tasks of HumanEval, and runs what the model writes",
        "write type: lm_eval, tasks: [humaneval], confirm_run_unsafe_code: True",
    ),
}
_EVALUATIONS = ("ppl", "token_acc", "decode_ppl", "lm_eval", "generate_only")
_AMOUNTS = {SHORTGPT: "n_prune_layers: 4"}


def refuse_unavailable(config: Config) -> None:
    """Refuse what the schema knows but this version doesn't do.

    Raises:
        ConfigError: names the keys, and what is available.
    """
    quant, missing = config.quant, []
    for one in config.eval:
        if one.type in _ELSEWHERE:
            why, remedy = _ELSEWHERE[one.type]
            raise ConfigError(f"eval.type: {one.type} isn't measured here: {why}", remedy)
    if config.save.trtllm_cfg is not None:
        raise ConfigError(
            "save.trtllm_cfg: TensorRT-LLM no longer has engines that are built for a number of ranks",
            "remove it; save_trtllm writes one folder, and trtllm-serve --tp_size divides it when it loads it",
        )
    if quant is not None:
        missing += unavailable_cache(quant.kvcache)
        missing += ["quant.token_reduction"] if quant.token_reduction else []
        missing += unavailable(quant)
    if config.sparse is not None:
        known = config.sparse.method in _KINDS
        missing += [] if known else [f"sparse.method: {config.sparse.method}"]
        missing += ["sparse.kvcache"] if config.sparse.kvcache is not None else []
    missing += ["opencompass"] if config.opencompass is not None else []
    missing += [f"eval type '{one.type}'" for one in config.eval if one.type not in _EVALUATIONS]
    available = {exporter.name for exporter in EXPORTERS}
    asked = [name for name, value in config.save if value is True]
    missing += [f"save.{name}" for name in asked if name not in available]
    if missing:
        pruners = ", ".join(name for name, kind in _KINDS.items() if kind == "pruner")
        raise ConfigError(
            f"not available in this version: {', '.join(dict.fromkeys(missing))}",
            "available are weights and activations of 2 to 8 bits or e4m3, e5m2, e2m1, mxfp4, mxfp8, nvfp4, "
            f"the KV cache, pruning by {pruners}, perplexity by prefill and by decoding, agreement of tokens "
            "(token_acc), tasks of lm-eval, continued prompts (generate_only), "
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


def _asked(config: Config) -> list[type[Exporter]]:
    """The formats that the file asks for."""
    names = {name for name, value in config.save if value is True}
    return [kind for kind in EXPORTERS if kind.name in names]


def packing_of(config: Config, stored: torch.dtype) -> Packing:
    """How packed weights are stored, such that all formats to be saved agree on it."""
    kinds = _asked(config)
    wanted = {kind.name: kind.scale_dtype for kind in kinds if kind.scale_dtype}
    return make_packing(stored, wanted, {kind.name: kind.exact_product for kind in kinds if kind.stores_codes})


def make_recipe_of(config: Config, stored: torch.dtype, kv: KvSpec | None) -> Recipe:
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
    packing = packing_of(config, stored)
    weight = weight_spec(quant.weight, quant.act, packing) if quant and quant.weight else None
    recipe = Recipe((), None, ignored, config.base.seed)
    if methods := _methods(config):
        recipe = make_recipe(
            methods,
            {**(quant.options if quant else {}), **(sparse.options if sparse else {})},
            weight,
            ignored,
            quant_out=quant.quant_out if quant else None,
            seed=config.base.seed,
            sparsity=make_sparsity(config),
            sparsity_out=sparse.sparsity_out if sparse else None,
            act=act,
            kv=kv,
            rules=make_rules(quant, packing) if quant else (),
        )
    if config.calib is not None:
        experts = ExpertCalibration(config.calib.moe == "all_tokens", config.calib.moe_min_tokens)
        recipe = replace(recipe, experts=experts)
    if any(kind.wants_squares for kind in _asked(config)):
        recipe = replace(recipe, observes=True)
    if sparse is not None and sparse.method == SHORTGPT:
        recipe = replace(recipe, drop_blocks=sparse.weight.n_prune_layers or 0)
    budget = None if quant is None else quant.bit_budget
    if budget is not None and budget.losses is None:
        recipe = replace(recipe, surveys=True)
    if recipe.needs_data and config.calib is None:
        asking = [SHORTGPT] * (recipe.drop_blocks > 0)
        asking += ["quant.mix_bits.budget"] * recipe.surveys
        asking += [step.algorithm.name for step in recipe.steps if step.algorithm.needs(quant_out=None).data]
        static = [one for one in recipe.acts if one.observer is not None]
        asking += ["save.save_imatrix"] * recipe.observes
        asking += [f"{'quant.act' if one == act else 'quant.mix_bits'} ({one.describe()})" for one in static]
        raise ConfigError(
            f"{asking[0]} needs calibration text, but there is no section 'calib'",
            "add calib with name, n_samples, seq_len and preproc",
        )
    return recipe


def check_layers(recipe: Recipe, subsets: Sequence[Subset]) -> None:
    """Whether every transform that is limited to some Linears can do with those of a block.

    Raises:
        ConfigError: a name means none of them, only some of those that read one input, or one that the method can't
            change.
    """
    for step in recipe.steps:
        for name in step.algorithm.layers or ():
            _check_layer(step.algorithm, name, subsets)


def _check_layer(algorithm: Algorithm, name: str, subsets: Sequence[Subset]) -> None:
    key, named = f"quant.special: layers of {algorithm.name}", algorithm.layers or ()
    linears = [linear for subset in subsets for linear in subset.linears]
    meant = [subset for subset in subsets if any(is_named(linear, name) for linear in subset.linears)]
    if not meant:
        short = [linear.rpartition(".")[2] for linear in linears]
        raise ConfigError(
            f"{key}: a block has no Linear {name!r}{did_you_mean(name, [*short, *linears])}",
            f"its Linears are {', '.join(linears)}",
        )
    for subset in meant:
        without = [linear for linear in subset.linears if not any(is_named(linear, other) for other in named)]
        if without:
            raise ConfigError(
                f"{key}: {name} is named without {', '.join(without)}: they read one input, which a scale changes for "
                "all of them",
                "name all of them, or none",
            )
        if not algorithm.covers(subset):
            raise ConfigError(
                f"{key}: no norm feeds {name}, and {algorithm.name} changes only what one feeds",
                "leave it out; Awq changes other Linears too",
            )
        if algorithm.folds and subset.prev is None:
            raise ConfigError(
                f"{key}: nothing in front of {name} can absorb a scale of its input", f"leave {name} out of them"
            )


def _methods(config: Config) -> list[str]:
    """The methods of both sections in their order: transforms, pruner, quantizer."""
    methods = [] if config.quant is None else list(config.quant.method)
    if misplaced := [name for name in methods if _KINDS[name] == "pruner"]:
        raise ConfigError(
            f"quant.method: {misplaced[0]} prunes, which isn't for the section quant",
            f"write sparse: {{method: {misplaced[0]}, weight: {{{_AMOUNTS.get(misplaced[0], 'sparsity: 0.5')}}}}} and "
            f"quant.method: {[name for name in methods if _KINDS[name] != 'pruner'] or ['RTN']}, "
            "or no section quant if nothing is to be quantized",
        )
    if config.sparse is not None and config.sparse.method != SHORTGPT:  # which isn't a step within a block
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


def make_exporters(
    config: Config,
    recipe: Recipe,
    layers: Sequence[Layer],
    stored: torch.dtype,
    compute: torch.dtype,
    layout: StoredLayout | None = None,
) -> list[Exporter]:
    """The formats that the file asks for.

    Raises:
        ConfigError: there is nothing to save.
        ExportError: a format has one scheme for all Linears, and ``quant.mix_bits`` asks for several.
    """
    asked = _asked(config)
    if asked and config.quant is None and config.sparse is None:
        raise ConfigError(
            "save: there is nothing to save without a section 'quant' or 'sparse'",
            "add one of them, or remove the save_* keys",
        )
    return exporters_of(asked, recipe, layers, stored, compute, layout)


def exporters_of(
    kinds: Sequence[type[Exporter]],
    recipe: Recipe,
    layers: Sequence[Layer],
    stored: torch.dtype,
    compute: torch.dtype,
    layout: StoredLayout | None = None,
) -> list[Exporter]:
    """These formats for what a recipe makes of a model whose own checkpoints have a ``layout``.

    Raises:
        ExportError: a format has one scheme for all Linears, and ``quant.mix_bits`` asks for several.
    """
    mixed = mixed_schemes(recipe, layers)
    uniform = [kind.name for kind in kinds if mixed and not kind.mixes_schemes]
    if uniform:
        able = ", ".join(kind.name for kind in EXPORTERS if kind.mixes_schemes)
        raise ExportError(
            f"quant.mix_bits: {uniform[0]} stores one scheme for all layers", f"write {able}, or remove mix_bits"
        )
    act = recipe.act or recipe.clustered
    fused = {layer.name: layer.fused for layer in layers}
    images = any(layer.outside for layer in layers)
    return [kind(recipe.spec, stored, compute, act, recipe.kv, mixed, fused, layout, images) for kind in kinds]


def mixed_schemes(recipe: Recipe, layers: Sequence[Layer]) -> dict[str, Scheme]:
    """Schemes of the quantized Linears that have another one than most: a rule says so, or they are an encoder's. By
    the checkpoint's names."""
    own = (layer for layer in layers if layer.spec is not None and (recipe.rules or layer.outside))
    found = {layer.name: layer.scheme for layer in own}
    return {name: scheme for name, scheme in found.items() if scheme != recipe.scheme}


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


def image_text_spec(calib: CalibConfig, mark: str, token: int) -> ImageTextSpec:
    """Which images and questions to calibrate on; ``mark`` stands for an image in a prompt, ``token`` for a part of
    it in what the model is given."""
    return ImageTextSpec(
        folder=Path(calib.path or ""),
        n_samples=calib.n_samples,
        seq_len=calib.seq_len,
        mark=mark,
        token=token,
        apply_chat_template=calib.apply_chat_template,
        add_answer=calib.add_answer,
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
