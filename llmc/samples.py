"""The texts, and the images, of a run: read, turned into what the model is given, and checked against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from .algorithms import Recipe
from .config import Config
from .data import EvaluationSpec, EvaluationWindows, calibration_samples, evaluation_windows, image_text_samples
from .errors import ConfigError, DataError, ModelError
from .jobs import PROMPTS, TASKS
from .models import ModelAdapter
from .stream.batch import Batch
from .stream.skeleton import Skeleton
from .translate import IMAGE_TEXT, batched, calibration_spec, evaluation_spec, image_text_spec


@dataclass(frozen=True)
class Evaluation:
    """One text to evaluate on.

    Attributes:
        name: as the configuration calls it.
        kind: ``ppl``; ``token_acc``, compared with the original; or ``decode_ppl``, token by token with a KV cache.
        positions: the states of the model, as the configuration calls them.
        windows: the tokens.
        batches: the same in batches.
    """

    name: str
    kind: str
    positions: tuple[str, ...]
    windows: EvaluationWindows
    batches: list[Tensor]


def check_images(config: Config, recipe: Recipe, adapter: ModelAdapter) -> None:
    """Refuse what a model that reads images can't have, and images for one that doesn't.

    Raises:
        ConfigError: names the key.
        ModelError: says what the model's code does that the method can't follow.
    """
    images, shown = adapter.images, config.calib is not None and config.calib.name == IMAGE_TEXT
    if images is None:
        if shown and recipe.needs_data:
            raise ConfigError(
                f"calib.name: {IMAGE_TEXT} brings images, and {adapter.name} reads text alone", "use name: text"
            )
        return
    if recipe.drop_blocks and (images.optional or images.between):
        raise ModelError(
            f"blocks of {adapter.name} can't be dropped: its images enter at blocks that are counted",
            "use a method that keeps them",
        )
    if images.optional and (recipe.kv is not None or recipe.clusters):
        raise ModelError(
            f"some blocks of {adapter.name} attend to the image, whose keys aren't those of a growing cache",
            "remove quant.kvcache, or use another method",
        )
    if images.looks_ahead and shown and recipe.kv is not None:
        raise ModelError(
            f"tokens of an image attend to later ones in {adapter.name}, which no growing KV cache can show them",
            "calibrate with text, or remove quant.kvcache",
        )
    static = next((one for one in recipe.acts if one.observer is not None), None)
    if images.optional and not shown and static is not None:
        raise ConfigError(
            f"quant.act: {static.describe()} needs ranges, and text never reaches the blocks of {adapter.name} that "
            "attend to an image",
            f"calibrate with images (calib.name: {IMAGE_TEXT}), or use dynamic scales",
        )


def image_warnings(config: Config, recipe: Recipe) -> list[str]:
    """What of the section ``calib`` has no effect on samples with images."""
    calib = config.calib
    if calib is None or calib.name != IMAGE_TEXT or not recipe.needs_data:
        return []
    idle = [
        f"calib.{key}: {value}"
        for key, value in (("bs", calib.bs), ("padding", calib.padding))
        if value not in (1, False)
    ]
    return [
        f"{', '.join(idle)}: samples with images differ in length; each is a batch of its own, without padding"
    ] * bool(idle)


def calibration(config: Config, folder: Path, tokenizer: Any, skeleton: Skeleton) -> list[Batch]:
    """Text in batches of ``calib.bs``; samples with images have lengths of their own, and are batches of one."""
    spec = calibration_spec(config)
    if spec is None or config.calib is None:
        return []
    if skeleton.images is not None and config.calib.name == IMAGE_TEXT:
        shown = image_text_spec(config.calib, skeleton.images.mark, skeleton.model.config.image_token_id)
        processor = load_processor(folder, trust_remote_code=config.model.trust_remote_code)
        return [Batch(sample.tokens, sample.further) for sample in image_text_samples(shown, processor)]
    return [Batch(tokens) for tokens in batched(calibration_samples(spec, tokenizer), config.calib.bs)]


def evaluations_of(config: Config, tokenizer: Any) -> list[Evaluation]:
    """The texts to evaluate on, in batches of ``eval.bs``; each is read and tokenized once."""
    evaluations = []
    read: dict[EvaluationSpec, EvaluationWindows] = {}
    for one in config.eval:
        if one.eval_pos and one.type not in (TASKS, PROMPTS):
            spec = evaluation_spec(one)
            windows = read[spec] = read.get(spec) or evaluation_windows(spec, tokenizer)
            batches = batched(list(windows.tokens), one.bs)
            evaluations.append(Evaluation(one.name, one.type, tuple(one.eval_pos), windows, batches))
    return evaluations


def load_tokenizer(folder: Path, *, fast: bool, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        DataError: there is none, or it isn't understood.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, use_fast=fast, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as problem:
        raise DataError(f"{folder}: the tokenizer can't be loaded: {problem}", "is tokenizer.json there?") from problem


def load_processor(folder: Path, *, trust_remote_code: bool) -> Any:
    """The checkpoint's processor of images and text.

    Raises:
        DataError: there is none, it isn't understood, or a package is missing that it needs.
    """
    try:
        auto: Any = AutoProcessor  # from_pretrained has no annotations
        return auto.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as problem:
        raise DataError(
            f"{folder}: the processor of images needs another package: {str(problem).strip().splitlines()[0]}",
            'install what reads images: pip install "llmc[vision]"',
        ) from problem
    except (ValueError, OSError, KeyError, TypeError) as problem:
        raise DataError(
            f"{folder}: the processor of images can't be loaded: {problem}",
            "is preprocessor_config.json (or processor_config.json) there?",
        ) from problem


def check_tokens(folder: Path, known: int, calib: Sequence[Batch], evaluations: Sequence[Evaluation]) -> None:
    """Refuse text with tokens that the model has no embedding for."""
    every = [*(batch.tokens for batch in calib), *(one.windows.tokens for one in evaluations)]
    largest = max((int(tokens.max()) for tokens in every), default=0)
    if largest >= known:
        raise DataError(
            f"{folder}: the tokenizer gives the token {largest}, but the model knows only {known} (config.json)",
            "do the tokenizer and the model belong together?",
        )
