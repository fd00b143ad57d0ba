"""Settings of quant.mix_bits: which layers a name means, and what a setting must say."""

from __future__ import annotations

import pytest

from llmc.config import load_config
from llmc.config.places import LayerPlace, layer_place
from llmc.errors import ConfigError

W8 = {"bit": 8, "symmetric": True, "granularity": "per_channel"}
A8 = {"bit": 8, "symmetric": True, "granularity": "per_token"}


@pytest.mark.parametrize(
    ("text", "name", "blocks"),
    [
        ("down_proj", "down_proj", None),
        ("mlp.down_proj#0-1-2", "mlp.down_proj", {0, 1, 2}),
        ("down_proj#0-3", "down_proj", {0, 3}),
        ("down_proj#7", "down_proj", {7}),
        ("down_proj#0..3-31", "down_proj", {0, 1, 2, 3, 31}),
        ("mlp.experts.*.down_proj", "mlp.experts.*.down_proj", None),
    ],
)
def test_a_name_with_the_numbers_of_its_blocks(text, name, blocks):
    assert layer_place(text) == LayerPlace(name, None if blocks is None else frozenset(blocks))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"layer_name": ["down_proj#"], "weight": W8}, "'down_proj#': behind # stand numbers"),
        ({"layer_name": ["down_proj#0,1"], "weight": W8}, "behind # stand numbers"),
        ({"layer_name": ["down_proj#3..1"], "weight": W8}, "3..1 runs backwards"),
        ({"layer_name": ["#0-1"], "weight": W8}, "doesn't begin with a layer's name"),
        ({"layer_name": [], "weight": W8}, "layer_name"),
        ({"layer_name": ["down_proj"]}, "weight: missing"),
        ({"layer_name": ["down_proj"], "weight": {"bit": 16}}, "do_quant: False"),
        ({"layer_name": ["down_proj"], "act": A8}, "weight: missing"),
        ({"layer_name": ["down_proj"], "weight": {**W8, "bits": 4}}, "did you mean 'bit'"),
        (
            {
                "layer_name": ["down_proj"],
                "weight": {"bit": "e4m3", "symmetric": True, "granularity": "per_block", "block_size": 128},
                "act": A8,
            },
            "need act per_group with group_size 128",
        ),
    ],
)
def test_a_setting_that_says_too_little_or_what_cannot_be(setting, said):
    with pytest.raises(ConfigError) as error:
        load_config({"model": {"path": "m"}, "quant": {"method": "RTN", "weight": W8, "mix_bits": {"one": setting}}})
    assert "quant.mix_bits.one" in str(error.value)
    assert said in str(error.value)
