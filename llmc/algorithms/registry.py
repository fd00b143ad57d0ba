"""The methods by their names in a YAML file."""

from __future__ import annotations

from .awq import Awq
from .base import Algorithm, Options
from .gptq import GPTQ
from .magnitude import Magnitude
from .omniquant import OmniQuant
from .osplus import OsPlus
from .quarot import Quarot
from .rptq import RPTQ
from .rtn import RTN
from .shortgpt import NAME as SHORTGPT
from .shortgpt import ShortGPTOptions
from .smoothquant import SmoothQuant
from .sparsegpt import SparseGPT
from .wanda import Wanda

ALGORITHMS: tuple[type[Algorithm], ...] = (
    RTN,
    GPTQ,
    Awq,
    SmoothQuant,
    OsPlus,
    Quarot,
    RPTQ,
    Magnitude,
    Wanda,
    SparseGPT,
    OmniQuant,
)


def options_types() -> dict[str, type[Options]]:
    """Options model of each method, for the configuration to validate ``quant.special`` against."""
    return {algorithm.name: algorithm.options_type for algorithm in ALGORITHMS} | {SHORTGPT: ShortGPTOptions}
