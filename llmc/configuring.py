"""Configurations, with the options of all methods that llmc has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import config
from .algorithms import options_types
from .config import LoadedConfig


def load_config(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, complete and check a configuration. No model is looked for.

    Args:
        source: path of a YAML file, or its content.
        overrides: ``key.path=value`` each; the value is YAML.

    Raises:
        ConfigError: names every key that is wrong, with its line.
    """
    return config.load_config(source, overrides, options_types())
