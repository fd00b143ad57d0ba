"""A run that learns, from a file in LLMC's spelling."""

from __future__ import annotations

import json

import pytest
from cases import reload


def test_awq_then_omniquant_in_one_run(case):
    one = case(
        method=["Awq", "OmniQuant"],
        quant={
            "weight": {
                "bit": 4,
                "symmetric": False,
                "granularity": "per_group",
                "group_size": 32,
                "calib_algo": "learnable",
                "ste": True,
            },
            "special": {"OmniQuant": {"lwc": True, "let": False, "epochs": 1, "deactive_amp": True, "wd": 0}},
        },
    )
    result = one.compress()
    blocks = json.loads((one.save_path / "metrics.json").read_text())["blocks"]
    assert all(block["tuning"]["end"] <= block["tuning"]["start"] for block in blocks)
    assert any(block["tuning"]["epoch"] == 1 for block in blocks)
    assert [one.position for one in result.perplexities] == ["pretrain", "fake_quant"]
    assert reload(one.save_path / "fake_quant_model").config.model_type == "llama"
    assert result.metrics["blocks"][0]["tuning"] == pytest.approx(blocks[0]["tuning"])
