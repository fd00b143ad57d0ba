"""Mixtures that have learned something: their perplexity says whether a method is better than another."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import reload
from real import text
from train import CONFIGS, trained
from transformers import AutoTokenizer

import llmc

WINDOW, WINDOWS = 128, 24
W3 = {"bit": 3, "symmetric": True, "granularity": "per_group", "group_size": 32}


def compress(folder: Path, save_path: Path, method: str, moe: str = "routed") -> dict[str, float]:
    plain: dict[str, Any] = {"name": "text", "bs": 8}
    result = llmc.compress(
        {
            "base": {"device": "cpu"},
            "model": {"path": str(folder), "torch_dtype": "float32"},
            "calib": {
                **plain,
                "path": text("valid"),
                "n_samples": 32,
                "seq_len": 64,
                "preproc": "sequential",
                "moe": moe,
            },
            "eval": {
                **plain,
                "path": text("test"),
                "seq_len": WINDOW,
                "num_chunks": WINDOWS,
                "eval_pos": ["pretrain", "fake_quant"],
            },
            "quant": {"method": method, "weight": W3},
            "save": {"save_fake": True, "save_path": str(save_path)},
        }
    )
    return {one.position: one.value for one in result.perplexities}


def evaluation_tokens(folder: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(Path(text("test")).read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)


@torch.no_grad()
def whole_model_perplexity(folder: Path, tokens: torch.Tensor) -> float:
    logits = reload(folder, experts_implementation="eager")(input_ids=tokens, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return exp(float(losses))


@pytest.mark.parametrize("family", CONFIGS)
def test_gptq_loses_less_than_rounding_to_nearest(family, tmp_path):
    folder = trained(family)
    tokens = evaluation_tokens(folder)
    counts = torch.bincount(tokens.flatten(), minlength=1).double()
    shares = counts[counts > 0] / counts.sum()
    unigram = exp(float(-(shares * shares.log()).sum()))  # the least that any model without context could have
    found = {
        "RTN": compress(folder, tmp_path / "rtn", "RTN"),
        "GPTQ": compress(folder, tmp_path / "gptq", "GPTQ"),
        "all tokens": compress(folder, tmp_path / "all", "GPTQ", moe="all_tokens"),
    }
    original, nearest = found["RTN"]["pretrain"], found["RTN"]["fake_quant"]
    print(f"{family}: unigram {unigram:.2f}, original {original:.3f}, {found}")
    assert original < 0.75 * unigram
    assert original == pytest.approx(whole_model_perplexity(folder, tokens), rel=1e-5)
    assert original < nearest
    for name in ("GPTQ", "all tokens"):  # they may be below the original: on so short a text by chance
        assert found[name]["fake_quant"] - original < 2 / 3 * (nearest - original)
    fake = whole_model_perplexity(tmp_path / "gptq" / "fake_quant_model", tokens)
    assert found["GPTQ"]["fake_quant"] == pytest.approx(fake, rel=1e-5)
