"""The methods by their names in a YAML file."""

from __future__ import annotations

from .awq import Awq
from .base import Algorithm, Options
from .gptq import GPTQ
from .osplus import OsPlus
from .rtn import RTN
from .smoothquant import SmoothQuant

ALGORITHMS: tuple[type[Algorithm], ...] = (RTN, GPTQ, Awq, SmoothQuant, OsPlus)


def options_types() -> dict[str, type[Options]]:
    """Options model of each method, for the configuration to validate ``quant.special`` against."""
    return {algorithm.name: algorithm.options_type for algorithm in ALGORITHMS}
