"""Makes large language models small without making them worse, one block at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LlmcError", "Result", "__version__", "compress", "load_config"]

if TYPE_CHECKING:
    from .configuring import load_config
    from .errors import LlmcError
    from .run import Result, compress


def __getattr__(name: str) -> Any:
    """Import on first use: ``import llmc`` alone costs nothing."""
    if name in ("Result", "compress"):
        from . import run

        return getattr(run, name)
    if name == "load_config":
        from .configuring import load_config

        return load_config
    if name == "LlmcError":
        from .errors import LlmcError

        return LlmcError
    raise AttributeError(f"module 'llmc' has no attribute '{name}'")
