"""A run's configuration as somebody would write it, and the commands that repeat it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from ...configuring import load_config
from ...errors import LlmcError

_INSTALLED = ("torch", "transformers", "compressed-tensors", "safetensors", "tokenizers")


def file_of(name: str) -> str:
    """A file name for the configuration."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.') or 'run'}.yml"


def install_of(versions: Mapping[str, str]) -> str:
    """The command that installs the libraries which the numbers depend on, in the run's versions."""
    wanted = [f"{name}=={versions[name].partition('+')[0]}" for name in _INSTALLED if name in versions]
    return f"pip install {' '.join(wanted)}" if wanted else ""


def yaml_of(config: Mapping[str, Any]) -> str:
    """The configuration without what is the default anyway."""
    return yaml.safe_dump(shortened(config), sort_keys=False, allow_unicode=True, width=100)


def shortened(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration without the values that a key has by default; whole, where this version of llmc doesn't
    know one of its keys."""
    try:
        known = load_config(dict(config)).config
    except LlmcError:
        return dict(config)
    short: dict[str, Any] = known.model_dump(mode="json", exclude_defaults=True)
    for name, section in (("quant", known.quant), ("sparse", known.sparse)):
        if section is not None:
            options = {
                method: given.model_dump(mode="json", exclude_defaults=True)
                for method, given in section.options.items()
            }
            short[name].pop("special", None)
            if given := {method: values for method, values in options.items() if values}:
                short[name]["special"] = given
    return {section: short[section] for section in config if section in short}
