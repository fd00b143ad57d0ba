"""Modules that aren't ``nn.Linear`` but compute what one does, replaced in an empty model: so a Linear is all that the
methods have to know. How their weights are stored is said in ``layouts.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Replacement:
    """What replaces the modules of a class.

    Attributes:
        old: the class, exactly.
        new: from such a module, on the meta device, to the one in its place, also there and of the same dtype.
    """

    old: type[nn.Module]
    new: Callable[[nn.Module], nn.Module]


def _linear_of(module: nn.Module) -> nn.Module:
    """GPT-2's ``Conv1D`` has a weight ``[in, out]`` and always a bias."""
    if not isinstance(module, Conv1D):
        raise TypeError(f"{type(module).__name__} isn't a Conv1D")
    inputs, outputs = module.weight.shape
    return nn.Linear(inputs, outputs, device=module.weight.device, dtype=module.weight.dtype)


REPLACEMENTS: tuple[Replacement, ...] = (Replacement(Conv1D, _linear_of),)


def linearize(model: nn.Module) -> None:
    """Put Linears in place of all modules that there is a replacement for."""
    for name, module in list(model.named_modules()):
        for replacement in REPLACEMENTS:
            if type(module) is replacement.old:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, replacement.new(module))
