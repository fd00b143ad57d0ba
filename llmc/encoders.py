"""What is to become of the encoder of a model that reads images: checked and planned before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .algorithms import Recipe
from .architecture import check_linears
from .config import Config
from .config.schema import IgnoredLayers
from .errors import ConfigError, DataError
from .export import Layer
from .models import Encoder, ModelAdapter
from .plan import Estimate, make_layers
from .stream.batch import Batch
from .stream.decoding import Checkpoint, Entry
from .stream.front import encoder_of
from .stream.skeleton import EMBED, Skeleton
from .translate import IMAGE_TEXT, check_layers, make_recipe_of, refuse_unavailable

_STREAMS = 4  # at most: calibration and evaluation, of the original and of the compressed encoder


@dataclass(frozen=True)
class EncoderPlan:
    """What happens to the encoder's blocks.

    Attributes:
        encoder: what they are made of.
        lists: each list of them as the blocks of a model.
        recipe: what to do.
        layers: their Linears.
    """

    encoder: Encoder
    lists: tuple[Skeleton, ...]
    recipe: Recipe
    layers: list[Layer]

    def images(self, calib: Sequence[Batch]) -> list[Batch]:
        """The samples that reach the encoder."""
        return [batch for batch in calib if batch.has_images]

    def patches(self, calib: Sequence[Batch]) -> int:
        """At most so many vectors are between two blocks, of all samples together."""
        vision: Any = self.lists[0].model.config.vision_config
        declared = vision.patch_size
        size = int(declared if isinstance(declared, int) else max(declared))
        pixels: int = sum(batch.further["pixel_values"].numel() for batch in self.images(calib))
        return math.ceil(pixels / (3 * size * size))

    def held(self, calib: Sequence[Batch]) -> int:
        """Bytes that all samples hold inside a block while they wait for one another."""
        width = self.encoder.heads.query * self.encoder.heads.dim
        widest = max(layer.columns for layer in self.layers)
        size: int = self.lists[0].model.dtype.itemsize
        return self.patches(calib) * (3 * width + widest) * size


def plan_encoder(
    config: Config, adapter: ModelAdapter, skeleton: Skeleton, entries: Mapping[str, Entry], stored: torch.dtype
) -> tuple[EncoderPlan | None, Config]:
    """What ``quant.vision`` asks for, and the configuration of the language blocks.

    Of ``ignored_layers`` those ``special_names`` that name Linears of the encoder are the encoder's, everything else is
    the language blocks'.

    Args:
        config: the whole configuration.
        adapter: the model's.
        skeleton: the empty model.
        entries: the checkpoint's tensors.
        stored: the dtype of its weights.

    Raises:
        ConfigError: names the key; the family reads text alone, or a grid doesn't fit.
        ModelError: this encoder's blocks can't be compressed.
    """
    vision = None if config.quant is None else config.quant.vision
    if vision is None:
        return None, config
    if adapter.images is None:
        raise ConfigError(
            f"quant.vision: {adapter.name} reads text alone, it has no image encoder", "remove the section vision"
        )
    encoder = adapter.images.encoder(skeleton.model.config)
    named = config.ignored_layers.special_names
    own = tuple(name for name in named if name.startswith(tuple(f"{path}." for path in encoder.lists)))
    rest = tuple(name for name in named if name not in own)
    ignored = IgnoredLayers.model_validate({"special_names": own})
    alone = config.model_copy(update={"quant": vision, "sparse": None, "ignored_layers": ignored})
    language = config.ignored_layers.model_copy(update={"special_names": rest})
    lists = tuple(encoder_of(skeleton, path, encoder.lists) for path in encoder.lists)
    with _about_vision():
        refuse_unavailable(alone)
        recipe = make_recipe_of(alone, stored, None)
        check_layers(recipe, encoder.subsets)
        layers = []
        for one in lists:
            subsets = [encoder.subsets] * len(one.blocks)
            check_linears(one.blocks, subsets)
            layers += make_layers(one, entries, encoder.heads, subsets, recipe)
    return EncoderPlan(encoder, lists, recipe, layers), config.model_copy(update={"ignored_layers": language})


@contextmanager
def _about_vision() -> Iterator[None]:
    """What knows one section ``quant`` speaks of ``quant.vision`` within the context."""
    try:
        yield
    except ConfigError as error:
        message, remedy = (text.replace("quant.", "quant.vision.") for text in (error.message, error.remedy))
        raise ConfigError(message, remedy) from error


def wants_images(plan: EncoderPlan | None, config: Config) -> bool:
    """Whether there is an encoder to calibrate with images, or, where the method needs none, to measure errors on
    them."""
    return plan is not None and config.calib is not None and config.calib.name == IMAGE_TEXT


def check_shown(plan: EncoderPlan, calib: Sequence[Batch], *, with_texts: bool) -> None:
    """Refuse to calibrate an encoder with samples of text alone.

    Raises:
        DataError: none has an image.
    """
    if with_texts and plan.recipe.needs_data and not plan.images(calib):
        raise DataError(
            "calib: no sample has an image, and quant.vision is calibrated with images",
            "name images in samples.json, or raise calib.n_samples",
        )


def with_encoder(
    estimate: Estimate, plan: EncoderPlan, calib: Sequence[Batch], checkpoint: Checkpoint, *, on_device: bool
) -> Estimate:
    """The estimate with the pass over the encoder: what is in front of the language blocks is read once more, and the
    compressed blocks are kept until the language model's turn."""
    skeleton = plan.lists[0]
    width = plan.encoder.heads.query * plan.encoder.heads.dim
    streams = _STREAMS * plan.patches(calib) * width * skeleton.model.dtype.itemsize
    names = ([name for unit in one.units.values() for name in unit] for one in plan.lists)
    read = sum(entry.nbytes for own in names for entry in checkpoint.sources(own))
    blocks = {name for one in plan.lists for unit, own in one.units.items() if unit != EMBED for name in own}
    kept = sum(checkpoint.entries[name].nbytes for name in blocks)
    larger = max(0, streams - estimate.streams)
    held = max(0, plan.held(calib) - estimate.held)
    return replace(
        estimate,
        read=estimate.read + read,
        disk=estimate.disk + kept + 2 * larger,
        streams=max(estimate.streams, streams),
        host=estimate.host + larger + (0 if on_device else held),
        device=estimate.device + (held if on_device else 0),
    )
