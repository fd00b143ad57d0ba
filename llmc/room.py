"""What of a block must be on the device together, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .algorithms import Recipe
from .config import Config
from .errors import ConfigError
from .models import Subset
from .plan import largest_block
from .stream.decoding import Entry
from .stream.skeleton import Skeleton


def experts_on_host(config: Config, skeleton: Skeleton, entries: Mapping[str, Entry], device: torch.device) -> bool:
    """Whether the experts of a block are to stay in the host's memory, from where they visit the device."""
    if config.base.experts != "auto" or device.type != "cuda":
        return config.base.experts == "host" and device.type != "cpu"
    return 2 * largest_block(skeleton, entries) > torch.cuda.mem_get_info(device)[0]


def check_learning(
    recipe: Recipe, skeleton: Skeleton, subsets: Sequence[tuple[Subset, ...]], device: torch.device
) -> None:
    """Refuse to learn a block that is too large for the device, and gradients in float16, where small ones vanish.

    Raises:
        ConfigError: says which.
    """
    learning = [step.algorithm.name for step in recipe.steps if step.algorithm.learns]
    if not learning:
        return
    if skeleton.model.dtype == torch.float16:
        raise ConfigError(
            f"model.torch_dtype: {learning[0]} learns by gradients, for which float16 is too narrow",
            "set model.torch_dtype to torch.bfloat16 or torch.float32",
        )
    if device.type != "cuda":
        return
    needed, free = learning_bytes(recipe, skeleton, subsets), torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise ConfigError(
            f"quant.method: {learning[0]} learns a block as a whole; the largest one of this model takes at least "
            f"{needed / 1e9:.1f} GB for that, and {free / 1e9:.1f} GB of the device are free",
            "use Awq or GPTQ, whose experts may stay in the host's memory, or a device with more of it",
        )


def learning_bytes(recipe: Recipe, skeleton: Skeleton, subsets: Sequence[tuple[Subset, ...]]) -> int:
    """What the weights of the largest block take at least while it is learned.

    They are its own; in another computing dtype than float32 the same in float32, and what comes of these in the
    computing dtype; and of each Linear that is rounded the float32 weight that is tried in its place.
    """
    size, most = skeleton.model.dtype.itemsize, 0
    again = 0 if skeleton.model.dtype == torch.float32 else 4 + size
    for index, (block, own) in enumerate(zip(skeleton.blocks, subsets, strict=True)):
        tried = sum(
            block.get_parameter(f"{name}.weight").numel()
            for subset in own
            for name in subset.linears
            if recipe.scheme_of(index, name, f"{skeleton.path}.{index}.{name}").weight is not None
        )
        most = max(most, (size + again) * sum(one.numel() for one in block.parameters()) + 4 * tried)
    return most
