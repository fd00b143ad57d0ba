"""Everything that can be known and checked before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from .algorithms import Frame, Online, Recipe
from .analyzing import Sample, analysis_sample, check_surfaces
from .architecture import check_linears
from .config import Config, LoadedConfig
from .encoders import EncoderPlan, check_shown, plan_encoder, wants_images, with_encoder
from .errors import ConfigError, ExportError
from .export import Exporter, Layer, Source
from .jobs import Jobs, prepare_jobs
from .measuring import Measuring
from .models import (
    Heads,
    ModelAdapter,
    Subset,
    check_reorderable,
    residual_of,
)
from .models.layouts import StoredLayout, layout_of
from .opening import Model, open_model
from .plan import Estimate, make_estimate, make_layers, outside_layers, stored_dtype
from .room import check_learning
from .samples import Evaluation, calibration, check_images, check_tokens, evaluations_of, image_warnings, load_tokenizer
from .stream.attention import check_attention
from .stream.batch import Batch
from .stream.decoding import Checkpoint, DenseEntry
from .stream.skeleton import Skeleton
from .translate import (
    check_layers,
    make_device,
    make_exporters,
    make_recipe_of,
    refuse_unavailable,
)
from .translate_kv import make_kv


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before a weight is read."""

    loaded: LoadedConfig
    folder: Path
    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    layers: list[Layer]
    exporters: list[Exporter]
    calib: list[Batch]
    evaluations: list[Evaluation]
    device: torch.device
    stored: torch.dtype
    adapter: ModelAdapter
    subsets: tuple[tuple[Subset, ...], ...]
    heads: Heads
    warnings: list[str]
    estimate: Estimate
    frame: Frame | None
    sample: Sample
    encoder: EncoderPlan | None
    jobs: Jobs = field(default_factory=Jobs)

    @property
    def changes(self) -> bool:
        """Whether another model comes out than goes in."""
        return self.recipe.changes or self.encoder is not None

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.loaded.config

    @property
    def entries(self) -> Mapping[str, DenseEntry]:
        """The checkpoint's tensors as they are once they're decoded."""
        return self.checkpoint.entries

    @property
    def layout(self) -> StoredLayout | None:
        """How the model's own checkpoints hold its Linears."""
        return layout_of(self.skeleton.model.config.model_type)


_TEXTS = frozenset({"calib", "eval"})


@dataclass(frozen=True)
class _Texts:
    """Tokens, where they are wanted.

    Attributes:
        tokenizer: None where no text is.
        calib: of the calibration set.
        evaluations: those that measure on a text.
    """

    tokenizer: Any = None
    calib: list[Batch] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)


def _read_texts(config: Config, model: Model, texts: frozenset[str], *, calibrated: bool) -> _Texts:
    if not texts:
        return _Texts()
    fast, trust = config.model.tokenizer_mode == "fast", config.model.trust_remote_code
    tokenizer = load_tokenizer(model.folder, fast=fast, trust_remote_code=trust)
    wanted = calibrated and "calib" in texts
    found = _Texts(
        tokenizer,
        calibration(config, model.folder, tokenizer, model.skeleton) if wanted else [],
        evaluations_of(config, tokenizer) if "eval" in texts else [],
    )
    check_tokens(model.folder, _vocabulary(model.skeleton), found.calib, found.evaluations)
    return found


def prepare(loaded: LoadedConfig, *, texts: frozenset[str] = _TEXTS) -> Prepared:
    """Check the configuration against the checkpoint, the text and the backends. Reads headers and text, no weight.

    Args:
        loaded: the configuration.
        texts: the sections whose texts are wanted, ``calib`` and ``eval``; with none, nor is the tokenizer.

    Raises:
        LlmcError: whatever would stop the run later.
    """
    config = loaded.config
    refuse_unavailable(config)
    device = make_device(config.base.device)
    if config.base.threads:
        torch.set_num_threads(config.base.threads)
    set_seed(config.base.seed)
    model = open_model(config, device)
    adapter, skeleton, entries, warnings = model.adapter, model.skeleton, model.checkpoint.entries, [*model.warnings]
    subsets = adapter.block_subsets(model.config.get_text_config(), skeleton.blocks)
    check_linears(skeleton.blocks, subsets)
    heads = adapter.heads(model.config.get_text_config())
    encoder, language = plan_encoder(config, adapter, skeleton, entries, model.stored)
    recipe = make_recipe_of(language, model.stored, make_kv(config, heads))
    check_learning(recipe, skeleton, subsets, device)
    _check_recipe(config, recipe, skeleton, subsets)
    check_images(config, recipe, adapter)
    frame = _frame(recipe, adapter, skeleton, subsets)
    online = recipe.online(frame)
    check_layers(recipe, list(dict.fromkeys(online.cut(subset) for own in subsets for subset in own)))
    layers = make_layers(skeleton, entries, heads, subsets, recipe, online)
    layers += outside_layers(skeleton, entries, encoder.layers if encoder else ())
    stored = stored_dtype(entries, layers)
    exporters = make_exporters(config, recipe, layers, stored, skeleton.model.dtype, layout_of(model.config.model_type))
    warnings += check_exporters(recipe, online, exporters, layers, source_of(model.folder, skeleton))
    if encoder is not None:
        _check_groups(encoder.recipe, exporters)
    warnings += image_warnings(config, recipe)
    if frame is not None:
        warnings += [warning for algorithm in recipe.at_load for warning in algorithm.warnings(frame)]
    read = _read_texts(config, model, texts, calibrated=recipe.needs_data or wants_images(encoder, config))
    sample = analysis_sample(config.report, recipe, read.calib, read.evaluations)
    estimate = make_estimate(
        skeleton,
        model.checkpoint,
        layers,
        exporters,
        calib_tokens=sum(batch.tokens.numel() for batch in read.calib),
        eval_tokens=Measuring(read.evaluations, recipe.kv).stream_tokens + 2 * sample.tokens,
        streams=(recipe.original_stream + recipe.compressed_stream, 1),
        on_device=device.type == "cuda",
        changed_at_load=bool(recipe.at_load),
        surveyed=recipe.drop_blocks > 0,
    )
    if encoder is not None:
        check_shown(encoder, read.calib, with_texts="calib" in texts)
        estimate = with_encoder(estimate, encoder, read.calib, model.checkpoint, on_device=device.type == "cuda")
    prepared = Prepared(
        loaded=loaded,
        folder=model.folder,
        checkpoint=model.checkpoint,
        skeleton=skeleton,
        recipe=recipe,
        layers=layers,
        exporters=exporters,
        calib=read.calib,
        evaluations=read.evaluations,
        device=device,
        stored=stored,
        adapter=adapter,
        subsets=subsets,
        heads=heads,
        warnings=warnings,
        estimate=estimate,
        frame=frame,
        sample=sample,
        encoder=encoder,
    )
    if "eval" not in texts:
        return prepared
    jobs = prepare_jobs(prepared, read.tokenizer)
    return replace(prepared, jobs=jobs, warnings=warnings + jobs.warnings)


def _vocabulary(skeleton: Skeleton) -> int:
    """How many tokens the model has an embedding for; configurations of models that read images needn't say."""
    if skeleton.images is None:
        return int(skeleton.model.config.get_text_config().vocab_size)
    return len(skeleton.model.get_input_embeddings().weight)


def _frame(
    recipe: Recipe, adapter: ModelAdapter, skeleton: Skeleton, subsets: tuple[tuple[Subset, ...], ...]
) -> Frame | None:
    """What transforms at loading may know of the model; None where there is no such step.

    Raises:
        ModelError: the architecture doesn't allow them.
    """
    if not recipe.at_load:
        return None
    config = skeleton.model.config.get_text_config()
    declared = residual_of(adapter, config, {subset for own in subsets for subset in own})
    linears = [
        block.get_submodule(name)
        for block, own in zip(skeleton.blocks, subsets, strict=True)
        for subset in own
        if subset.reads == "ffn"
        for name in subset.linears
    ]
    widths = {linear.in_features for linear in linears if isinstance(linear, nn.Linear)}
    ffn = widths.pop() if len(widths) == 1 else 0
    return Frame(subsets, adapter.heads(config), declared, config.hidden_size, recipe.seed, ffn)


def _check_recipe(config: Config, recipe: Recipe, skeleton: Skeleton, subsets: Sequence[tuple[Subset, ...]]) -> None:
    """Refuse what the model doesn't allow."""
    if recipe.kv is not None or any(one.type == "decode_ppl" for one in config.eval):
        check_attention(skeleton.model)
        _check_heads(subsets)
    if recipe.clusters:
        for own in dict.fromkeys(subsets):
            check_reorderable(own)
        _check_clustered(config, recipe, skeleton)
    _check_dropping(recipe, len(skeleton.blocks))
    check_surfaces(config.report, len(skeleton.blocks))


def _check_heads(subsets: Sequence[tuple[Subset, ...]]) -> None:
    """Refuse a cache of a model whose blocks haven't all got one."""
    bare = [index for index, own in enumerate(subsets) if not any(subset.reads == "heads" for subset in own)]
    if bare:
        raise ConfigError(
            f"quant.kvcache, or eval type 'decode_ppl': block {bare[0]} has no attention over keys and values",
            "leave out quant.kvcache, and evaluate with type ppl",
        )


def _check_dropping(recipe: Recipe, blocks: int) -> None:
    """Refuse to leave no block, or to drop one that is to stay as it is."""
    free = sum(not recipe.ignored.covers_block(index) for index in range(blocks))
    if recipe.drop_blocks > min(free, blocks - 1):
        kept = f", {blocks - free} of which ignored_layers keeps" if free < blocks else ""
        raise ConfigError(
            f"sparse.weight.n_prune_layers: {recipe.drop_blocks}, but the model has {blocks} blocks{kept}",
            f"the most is {min(free, blocks - 1)}",
        )


def _check_clustered(config: Config, recipe: Recipe, skeleton: Skeleton) -> None:
    """Refuse evaluations that a method of clusters doesn't take part in, and a model whose attention it can't round.

    Raises:
        ConfigError: names the evaluation.
        ModelError: says why.
    """
    if recipe.clustered is None:
        return
    check_attention(skeleton.model)
    method = recipe.steps[-1].algorithm.name
    for one in config.eval:
        if one.eval_pos and one.type == "decode_ppl":
            raise ConfigError(
                f"eval type 'decode_ppl': {method} rounds the attention of whole windows",
                "use type ppl: its ranges are static, so that decoding token by token gives the same",
            )
        if "fake_quant_wo_kv" in one.eval_pos:
            raise ConfigError(
                f"eval.eval_pos: fake_quant_wo_kv: {method} quantizes the KV cache with everything else",
                "use fake_quant; without quant.act only weights are quantized",
            )


def check_exporters(
    recipe: Recipe, online: Online, exporters: Sequence[Exporter], layers: list[Layer], source: Source
) -> list[str]:
    """Refuse what a format can't store or its backend can't load.

    Returns:
        Warnings: what it loads only under a condition.

    Raises:
        ExportError: says what, and what could be done.
    """
    _check_online(online, exporters)
    _check_groups(recipe, exporters)
    _check_carrying(source, exporters)
    _check_model_type(source.config["model_type"], exporters)
    return [warning for one in exporters for warning in (*one.check(layers), *one.check_source(source))]


def source_of(folder: Path, skeleton: Skeleton) -> Source:
    """The original checkpoint as exporters see it."""
    names = tuple(name for unit in skeleton.units.values() for name in unit)
    images = skeleton.images is not None
    return Source(folder, skeleton.model.config.get_text_config().to_dict(), names, images)


def _check_carrying(source: Source, exporters: Sequence[Exporter]) -> None:
    unable = [exporter.name for exporter in exporters if source.images and not exporter.carries_images]
    if unable:
        raise ExportError(
            f"{unable[0]} stores a language model alone, and this one reads images: its encoder and projector have no "
            "place there",
            "write save_vllm, or save_fake, which Transformers loads",
        )


def _check_groups(recipe: Recipe, exporters: Sequence[Exporter]) -> None:
    scattered = any(step.algorithm.scatters_groups(spec) for step in recipe.steps for spec in recipe.specs)
    unable = [exporter.name for exporter in exporters if not exporter.stores_group_index]
    if scattered and unable:
        raise ExportError(
            f"quant.special: actorder: true with static_groups: false leaves groups that {unable[0]} can't express "
            "(vLLM no longer loads an index of groups)",
            "set static_groups: true, or actorder: group_aware, or write save_fake, which Transformers loads",
        )


def _check_online(online: Online, exporters: Sequence[Exporter]) -> None:
    unable = [exporter.name for exporter in exporters if not exporter.runs_rotations]
    if online != Online() and unable:
        raise ExportError(
            f"quant.special: online_rotate: True with {unable[0]}: the model must rotate the input of its last "
            "feed-forward Linear while it runs, which no plain checkpoint makes it do",
            "set online_rotate: False, and let AWQ even that input out: method [Quarot, Awq, GPTQ], "
            "special: {Awq: {layers: [down_proj]}}; or write save_vllm; or evaluate only",
        )


def _check_model_type(model_type: str, exporters: Sequence[Exporter]) -> None:
    for exporter in exporters:
        if exporter.model_types is not None and model_type not in exporter.model_types:
            raise ExportError(
                f"{exporter.name}: its backend takes {', '.join(sorted(exporter.model_types))}, and this model is "
                f"{model_type}",
                f"leave out {exporter.name}; save_fake writes weights that any loader of the original model takes",
            )
