"""llmc from Python: what ``import llmc`` offers."""

from __future__ import annotations

from typing import Any

import pytest

import llmc
from llmc.algorithms.rptq import RPTQOptions


def settings(**special: Any) -> dict[str, Any]:
    grid = {"bit": 4, "symmetric": False, "granularity": "per_cluster"}
    return {"model": {"path": "m"}, "quant": {"method": "RPTQ", "weight": grid, "special": special}}


def test_a_configuration_is_loaded_with_the_options_of_its_method():
    loaded = llmc.load_config(settings(), ["quant.special.R1_clusters=7"])
    assert loaded.config.quant.options == {"RPTQ": RPTQOptions(R1_clusters=7)}


def test_an_option_that_a_method_has_not_got_is_refused():
    with pytest.raises(llmc.LlmcError, match=r"quant.special.R9_clusters: unknown key"):
        llmc.load_config(settings(R9_clusters=1))
