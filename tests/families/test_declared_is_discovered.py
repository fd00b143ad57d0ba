"""What every adapter declares is what running the model's own code shows, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import exact
import families
import family_configs
import pytest
import torch
import transformers as t
from torch import nn
from transformers import PretrainedConfig

from llmc.architecture import explore
from llmc.models import ADAPTERS, BlockFacts, Discovery, Subset, declared, discover, experts
from llmc.models.discovery import exact as exact_weights
from llmc.models.discovery import readers
from llmc.stream.empty import empty_model

CONFIGS: dict[str, PretrainedConfig] = {
    **family_configs.CONFIGS,
    **families.CONFIGS,
    **families.FUSED,
    "gpt2": exact.CONFIGS["gpt2"],
}
UNKNOWABLE = {"orderable"}  # whether channels may change places, discovery doesn't try


@dataclass(frozen=True)
class Rightly:
    """What differs, as ``block Linear: field``, and why."""

    lines: frozenset[str]
    reason: str


def _in_both_blocks(*lines: str) -> frozenset[str]:
    return frozenset(f"{block} {line}" for block in (0, 1) for line in lines)


CARRIED = "the residual goes on behind the norms, so that what enters a block isn't what the second norm reads"
DIFFERENT = {
    "bloom-carried": Rightly(
        _in_both_blocks("self_attention.dense: writes", "mlp.dense_h_to_4h: reads"),
        CARRIED,
    ),
    "chatglm-carried": Rightly(
        _in_both_blocks("self_attention.dense: writes", "mlp.dense_h_to_4h: reads", "mlp.dense_h_to_4h: inspect"),
        CARRIED + "; only Linears that read the residual are taken for several in one",
    ),
    "qwen3-next": Rightly(
        frozenset({"0 linear_attn.in_proj_qkvz: fused"}),
        "that backends run two Linears that read one tensor one by one isn't in the model's code",
    ),
}


def model_of(name: str, dtype: torch.dtype) -> nn.Module:
    """Without weights."""
    config = CONFIGS[name]
    kind = family_configs.REMOTE.get(type(config))
    if kind is None:
        return empty_model(config, dtype)
    with torch.device("meta"):
        return kind(config).to(dtype).eval()


@cache
def found_in(name: str) -> Discovery:
    config = CONFIGS[name]
    if type(config) in family_configs.REMOTE:
        return discover(model_of(name, torch.float64), config)
    return explore(config, trust_remote_code=False)


def differences(block: int, subsets: Sequence[Subset], facts: BlockFacts) -> set[str]:
    """Fields of subsets with the same Linears."""
    found = set()
    for one, other in zip(subsets, facts.subsets, strict=True):
        skipped = UNKNOWABLE | ({"writes"} if other.writes is None else set())
        found |= {
            f"{block} {one.linears[0]}: {field.name}"
            for field in fields(Subset)
            if field.name not in skipped and getattr(one, field.name) != getattr(other, field.name)
        }
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_declared_is_found(name):
    config, found = CONFIGS[name], found_in(name)
    adapter = declared(config.model_type)
    assert found.problem is None
    modules = dict(model_of(name, torch.float32).named_modules())
    assert (found.path, found.head) == (adapter.blocks, tuple(part for part in adapter.head if part in modules))
    blocks = modules[adapter.blocks]
    assert len(found.blocks) == len(blocks)
    lines: set[str] = set()
    for index, (block, facts) in enumerate(zip(blocks, found.blocks, strict=True)):
        subsets = adapter.subsets(config, block)
        assert (facts.problem, facts.loose) == (None, {})
        assert [one.linears for one in facts.subsets] == [one.linears for one in subsets]
        assert {one.key for one in facts.subsets if one.prev is None} == facts.reasons.keys()
        assert facts.heads in (None, adapter.heads(config))
        lines |= differences(index, subsets, facts)
    assert lines == (DIFFERENT[name].lines if name in DIFFERENT else frozenset())


def test_every_family_of_texts_is_compared():
    of_texts = {model_type for adapter in ADAPTERS if adapter.images is None for model_type in adapter.model_types}
    assert of_texts == {config.model_type for config in CONFIGS.values()}
    assert DIFFERENT.keys() <= CONFIGS.keys()


@pytest.mark.parametrize("field", sorted({field.name for field in fields(Subset)} - UNKNOWABLE - {"linears"}))
def test_a_wrong_declaration_would_be_noticed(field):
    """Of the last Linears of a mixture's experts."""
    facts = found_in("mixtral").blocks[0]
    wrong: dict[str, Any] = {"also": ("mlp.gate",), "rows": ((0, 1),), "offset": 1.0, "fused": None, "reads": "heads"}
    *others, last = facts.subsets
    changed = replace(last, **{field: wrong.get(field)})
    assert differences(0, (*others, changed), facts) == {f"0 {last.linears[0]}: {field}"}


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_why_a_clamped_expert_absorbs_nothing_is_said():
    facts = found_in("gpt-oss").blocks[0]
    last = next(one for one in facts.subsets if one.linears[0] == "mlp.experts.0.down_proj")
    assert facts.reasons[last.key] == "what stands between gate_proj and up_proj and it doesn't keep a scale of either"


def test_an_expert_whose_activation_is_of_the_other_half_is_told_apart(monkeypatch):
    monkeypatch.setattr(experts, "_activation", lambda fused: lambda gate, up: gate * up.sigmoid())
    assert _last_of_mixtral().prev == "mlp.experts.*.gate_proj"


def test_one_expert_that_keeps_no_scale_is_enough(monkeypatch):
    inner = experts.LinearExperts.inner

    def with_an_odd_one(self, index, inputs):
        return inner(self, index, inputs).sigmoid() if index == 3 else inner(self, index, inputs)

    assert _last_of_mixtral().prev == "mlp.experts.*.up_proj"
    monkeypatch.setattr(experts.LinearExperts, "inner", with_an_odd_one)
    assert _last_of_mixtral().prev is None


def _last_of_mixtral() -> Subset:
    facts = explore(CONFIGS["mixtral"], trust_remote_code=False).blocks[0]
    return next(one for one in facts.subsets if one.inspect == "mlp.experts.*.down_proj")


def test_weighted_copies_are_known_by_what_was_copied():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    scores = torch.rand(3, 5, 1, generator=generator, dtype=torch.float64)
    scores[1, 2:] = 0  # not routed
    assert readers._weighted(scores * tokens, tokens)
    assert not readers._weighted(scores * tokens.flip(0), tokens)
    assert not readers._weighted(scores * tokens * torch.arange(1, 9), tokens)
    assert not readers._weighted(scores * tokens, tokens[:4])


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4-moe"])
def test_a_model_without_weights_takes_no_memory_for_its_experts(name):
    """Nor does its discovery have to hold more than those of a block."""
    parameters = model_of(name, torch.float64).parameters()
    assert {(parameter.device.type, parameter.dtype) for parameter in parameters} == {("meta", torch.float64)}


def test_wide_experts_show_the_same(monkeypatch):
    """Their weights share values, some get no token."""
    config = t.MixtralConfig(**{**families.COMMON, "num_local_experts": 16, "num_experts_per_tok": 1})
    expected = explore(config, trust_remote_code=False).blocks
    monkeypatch.setattr(exact_weights, "_OWN", 0)
    found = explore(config, trust_remote_code=False).blocks
    assert found == expected
    assert [one.prev for one in found[0].subsets[2:]] == ["post_attention_layernorm", "mlp.experts.*.up_proj"]


def test_experts_that_get_weighted_copies_are_among_those_compared():
    parts = model_of("llama4-moe", torch.float32).modules()
    assert sum(isinstance(part, experts.StackedExperts) for part in parts) == 1
