"""Which Linears a rule means, and which of several rules counts."""

from __future__ import annotations

import pytest

from llmc.algorithms import Ignored, LayerPattern, Recipe, Rule
from llmc.quant import ActSpec, PerChannel, PerToken, QuantSpec, Scheme

W4, W8 = QuantSpec(4, True, PerChannel()), QuantSpec(8, True, PerChannel())
A8 = ActSpec(QuantSpec(8, True, PerToken()))


def pattern(name: str, *blocks: int) -> LayerPattern:
    return LayerPattern(name, name, frozenset(blocks) or None)


@pytest.mark.parametrize(
    ("meant", "block", "name", "expected"),
    [
        (pattern("down_proj"), 3, "mlp.down_proj", True),
        (pattern("mlp.down_proj"), 3, "mlp.down_proj", True),
        (pattern("proj"), 3, "mlp.down_proj", False),
        (pattern("n_proj"), 3, "mlp.down_proj", False),
        (pattern("down_proj", 0, 3), 3, "mlp.down_proj", True),
        (pattern("down_proj", 0, 3), 1, "mlp.down_proj", False),
        (pattern("mlp.experts.*.down_proj"), 0, "mlp.experts.17.down_proj", True),
        (pattern("experts.*.down_proj"), 0, "mlp.experts.17.down_proj", True),
        (pattern("mlp.experts.*.down_proj"), 0, "mlp.shared_expert.down_proj", False),
        (pattern("*_proj"), 0, "self_attn.q_proj", True),
    ],
)
def test_a_pattern_is_a_name_or_its_end(meant, block, name, expected):
    assert meant.covers(block, name) is expected


def test_the_first_rule_that_means_a_linear_counts_and_ignored_ones_stay():
    rules = (
        Rule("first", (pattern("down_proj", 0),), Scheme()),
        Rule("second", (pattern("down_proj"), pattern("o_proj")), Scheme(W8, A8)),
        Rule("third", (pattern("o_proj"),), Scheme(W4)),
    )
    recipe = Recipe((), W4, Ignored(full_names=frozenset({"layers.2.mlp.down_proj"})), rules=rules)

    def scheme(block: int, name: str) -> Scheme:
        return recipe.scheme_of(block, name, f"layers.{block}.{name}")

    assert scheme(0, "mlp.down_proj") == Scheme()
    assert scheme(1, "mlp.down_proj") == Scheme(W8, A8)
    assert scheme(2, "mlp.down_proj") == Scheme()
    assert scheme(1, "self_attn.o_proj") == Scheme(W8, A8)
    assert scheme(1, "mlp.up_proj") == Scheme(W4)
    assert recipe.specs == (W4, W8, W4)
    assert recipe.acts == (A8,)


def test_an_input_is_not_rounded_for_a_weight_that_is_not_quantized():
    with pytest.raises(ValueError, match="only quantized"):
        Scheme(None, A8)
