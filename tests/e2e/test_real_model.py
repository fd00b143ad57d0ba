"""On the real model: calibration pays, and no number moves unnoticed."""

from __future__ import annotations

import json

import pytest
from real import GOLDEN, METHODS, configuration, cut, measure, real_model, text

import llmc


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Perplexities of the first blocks of the real model."""
    return measure(cut(real_model(), tmp_path_factory.mktemp("real") / "cut"))


@pytest.mark.parametrize("name", ["original", *METHODS])
def test_perplexities_are_the_golden_ones(measured, name):
    """After an intended change: ``python tests/e2e/bless.py``."""
    assert measured[name] == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=2e-3)


@pytest.mark.parametrize("method", ["GPTQ", "Awq"])
def test_calibration_halves_the_loss_of_rounding(measured, method):
    assert measured[method] / measured["original"] - 1 < (measured["RTN"] / measured["original"] - 1) / 2


def test_the_whole_original_has_the_perplexity_that_transformers_measures():
    content = configuration(real_model(), "RTN")
    windows = {"path": text("test"), "seq_len": 1024, "num_chunks": 1, "eval_pos": ["pretrain"]}
    content = {key: content[key] for key in ("base", "model")} | {"eval": content["eval"] | windows}
    assert llmc.compress(content).perplexities[0].value == pytest.approx(10.9557, rel=1e-4)
