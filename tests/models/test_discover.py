"""Discovery finds what was declared, and of families that nobody declared what their code says; and no more."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import CONFIGS
from transformers import AutoConfig

from llmc.architecture import explore
from llmc.errors import ModelError
from llmc.models import Discovery, Heads, Subset, declared, heads_of
from llmc.models.discovery import exact
from llmc.stream.empty import empty_model

BASE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = {**BASE, "max_position_embeddings": 64}
GQA = {**TINY, "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def found_in(model_type: str, **values: Any) -> Discovery:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explore(AutoConfig.for_model(model_type, **values), trust_remote_code=False)


# --- what was declared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_declared_is_found(name):
    config = CONFIGS[name]
    adapter, found = declared(config.model_type), explore(config, trust_remote_code=False)
    model = empty_model(config, torch.float32)
    modules = dict(model.named_modules())
    assert found.problem is None
    assert (found.path, found.head) == (adapter.blocks, tuple(name for name in adapter.head if name in modules))
    for block, facts in zip(modules[adapter.blocks], found.blocks, strict=True):
        expected = [replace(subset, orderable=False) for subset in adapter.subsets(config, block)]
        if name == "opt-post-norm":  # what a norm stands behind isn't added to the residual as it is
            expected = [replace(s, writes=None) if s.writes == "residual" else s for s in expected]
        assert list(facts.subsets) == expected
        assert not facts.loose and facts.problem is None
        assert {s.key for s in facts.subsets if s.prev is None} == facts.reasons.keys()
    assert found.adapter().heads(config) == heads_of(config)


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_weights_that_share_their_values_show_the_same(name, monkeypatch):
    """Those are what large models get."""
    expected = explore(CONFIGS[name], trust_remote_code=False)
    monkeypatch.setattr(exact, "_OWN", 0)
    found = explore(CONFIGS[name], trust_remote_code=False)
    assert found.blocks == expected.blocks
    assert [s.prev for s in found.blocks[0].subsets] == [s.prev for s in expected.blocks[0].subsets]


def test_a_relu_that_is_often_zero_hides_no_channel():
    opt = CONFIGS["opt"]
    wide = type(opt)(**{**opt.to_dict(), "ffn_dim": 3000})
    assert [s.prev for s in explore(wide, trust_remote_code=False).blocks[0].subsets][-1] == "fc1"


def test_the_same_is_found_again_and_no_random_number_is_drawn():
    torch.manual_seed(7)
    first = explore(CONFIGS["qwen3"], trust_remote_code=False)
    after = torch.rand(1)
    second = explore(CONFIGS["qwen3"], trust_remote_code=False)
    torch.manual_seed(7)
    assert first.blocks == second.blocks and torch.equal(after, torch.rand(1))


# --- families that nobody declared, as their code in Transformers 5.23 has them --------------------------------------


def row(linears: str, prev: str | None, inspect: str | None = None, reads: str = "residual", writes: Any = "residual",
        **more: Any) -> Subset:  # fmt: skip
    """``a.b c`` stands for ``a.b`` and ``a.c``; one Linear alone is its own witness."""
    first, *others = linears.split()
    begin = first.rpartition(".")[0]
    names = (first, *(other if "." in other else f"{begin}.{other}" for other in others))
    return Subset(names, prev, first if inspect is None else inspect, reads, writes, **more)


def attention(norm: str | None, prefix: str = "self_attn", out: str = "o_proj", writes: Any = "residual", **more: Any):
    return [
        row(f"{prefix}.q_proj k_proj v_proj", norm, prefix, writes="heads", **more),
        row(f"{prefix}.{out}", f"{prefix}.v_proj", reads="heads", writes=writes),
    ]


def fused_attention(norm: str, fused: str, out: str, rows: Any) -> list[Subset]:
    """What the one Linear makes is seen in the attention."""
    at = fused.rpartition(".")[0]
    return [row(fused, norm, at, writes="heads"), row(out, fused, reads="heads", rows=rows)]


def swiglu(norm: str | None, prefix: str = "mlp", writes: Any = "residual", **more: Any) -> list[Subset]:
    return [
        row(f"{prefix}.gate_proj up_proj", norm, prefix, writes="ffn", **more),
        row(f"{prefix}.down_proj", f"{prefix}.up_proj", reads="ffn", writes=writes),
    ]


def gelu(norm: str, first: str, second: str) -> list[Subset]:
    return [row(first, norm, writes="ffn"), row(second, None, reads="ffn")]


def fused_swiglu(norm: str, writes: Any = "residual") -> list[Subset]:
    gate_up = "mlp.gate_up_proj"
    return [
        row(gate_up, norm, "mlp", writes="ffn"),
        row("mlp.down_proj", gate_up, reads="ffn", writes=writes, rows=((48, 96),)),
    ]


def side_by_side(first: str, second: str, norm: str) -> Subset:
    """Attention and feed-forward that read one norm."""
    one, other = row(first, None).linears, row(second, None).linears
    return Subset((*one, *other), norm, "", "residual", "inner", fused=(one, other))


IN, POST = "input_layernorm", "post_attention_layernorm"
HEADS = ((16, 24), (40, 48), (64, 72), (88, 96))  # the values among queries, keys and values of each head
QKV, DENSE = "self_attention.query_key_value", "self_attention.dense"
UP, DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
SANDWICH = [
    *attention(IN, writes=None, offset=1.0),
    *swiglu("pre_feedforward_layernorm", writes=None, offset=1.0),
]
MLA = [
    row("self_attn.q_a_proj kv_a_proj_with_mqa", IN, "self_attn", writes="inner"),
    row("self_attn.q_b_proj", "self_attn.q_a_layernorm", reads="inner", writes="heads"),
    row("self_attn.kv_b_proj", "self_attn.kv_a_layernorm", reads="inner", writes="heads"),
    row("self_attn.o_proj", "self_attn.kv_b_proj", reads="heads", rows=((8, 14), (22, 28), (36, 42), (50, 56))),
]
SHARED = ("mlp.gate", "mlp.shared_expert_gate")


def mixture(norm: str, also: tuple[str, ...] = ("mlp.gate",), shared: str = "", shared_first: bool = False,
            **more: Any) -> list[Subset]:  # fmt: skip
    """Four experts, and a shared one that is run before or after them."""
    at = [*(f"mlp.experts.{index}" for index in range(4)), *([shared] if shared else [])]
    pairs = tuple((f"{one}.gate_proj", f"{one}.up_proj") for one in at)
    first = tuple(name for pair in pairs for name in pair)
    downs = tuple(f"mlp.experts.{index}.down_proj" for index in range(4))
    routed = Subset(
        downs, "mlp.experts.*.up_proj", "mlp.experts.*.down_proj", "ffn", "residual",
        fused=tuple((down,) for down in downs), experts="mlp.experts",
    )  # fmt: skip
    own = [row(f"{shared}.down_proj", f"{shared}.up_proj", reads="ffn")] if shared else []
    last = [*own, routed] if shared_first else [routed, *own]
    return [
        Subset(first, norm, "mlp", "residual", "ffn", also=also, fused=pairs, experts="mlp.experts", **more),
        *last,
    ]


QWEN3_NEXT = mixture(POST, SHARED, "mlp.shared_expert", shared_first=True, offset=1.0)

FAMILIES: dict[str, tuple[str, dict[str, Any], list[list[Subset]]]] = {
    "falcon-7b": (
        "falcon",
        {**BASE, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
        [[side_by_side(QKV, UP, IN), row(DENSE, QKV, reads="heads", rows=((40, 48),)), row(DOWN, None, reads="ffn")]],
    ),
    "falcon-40b": (
        "falcon",
        {**BASE, "num_kv_heads": 2, "new_decoder_architecture": True},
        [[*fused_attention("ln_attn", QKV, DENSE, ((24, 32), (56, 64))), *gelu("ln_mlp", UP, DOWN)]],
    ),
    "falcon-rw": (
        "falcon",
        {**BASE, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        [[*fused_attention(IN, QKV, DENSE, HEADS), *gelu(POST, UP, DOWN)]],
    ),
    "bloom": (
        "bloom",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        [[*fused_attention(IN, QKV, DENSE, HEADS), *gelu(POST, UP, DOWN)]],
    ),
    "gpt_neox": (
        "gpt_neox",
        {**TINY, "intermediate_size": 48},
        [[*fused_attention(IN, "attention.query_key_value", "attention.dense", HEADS), *gelu(POST, UP, DOWN)]],
    ),
    "gpt_neox-sequential": (
        "gpt_neox",
        {**TINY, "intermediate_size": 48, "use_parallel_residual": False},
        [[*fused_attention(IN, "attention.query_key_value", "attention.dense", HEADS), *gelu(POST, UP, DOWN)]],
    ),
    "phi": (
        "phi",
        GQA,
        [
            [
                side_by_side("self_attn.q_proj k_proj v_proj", "mlp.fc1", IN),
                row("self_attn.dense", "self_attn.v_proj", reads="heads"),
                row("mlp.fc2", None, reads="ffn"),
            ]
        ],
    ),
    "phi3": (
        "phi3",
        GQA,
        [[*fused_attention(IN, "self_attn.qkv_proj", "self_attn.o_proj", ((48, 64),)), *fused_swiglu(POST)]],
    ),
    "gemma2": ("gemma2", {**GQA, "head_dim": 8}, [SANDWICH, SANDWICH]),
    "gemma3": (
        "gemma3_text",
        {**GQA, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        [SANDWICH, SANDWICH],
    ),
    "stablelm": ("stablelm", GQA, [[*attention(IN), *swiglu(POST)]]),
    "stablelm-parallel": (
        "stablelm",
        {**GQA, "use_parallel_residual": True, "qk_layernorm": True},
        [
            [
                side_by_side("self_attn.q_proj k_proj v_proj", "mlp.gate_proj up_proj", IN),
                row("self_attn.o_proj", "self_attn.v_proj", reads="heads"),
                row("mlp.down_proj", "mlp.up_proj", reads="ffn"),
            ]
        ],
    ),
    "gpt_bigcode": (
        "gpt_bigcode",
        GPT,
        [
            [
                *fused_attention("ln_1", "attn.c_attn", "attn.c_proj", ((40, 48),)),
                *gelu("ln_2", "mlp.c_fc", "mlp.c_proj"),
            ]
        ],
    ),
    "gpt2": (
        "gpt2",
        GPT,
        [
            [
                *fused_attention("ln_1", "attn.c_attn", "attn.c_proj", ((64, 96),)),
                *gelu("ln_2", "mlp.c_fc", "mlp.c_proj"),
            ]
        ],
    ),
    "olmo2": ("olmo2", GQA, [[*attention(None, writes=None), *swiglu(None, writes=None)]]),
    "granite": ("granite", {**GQA, "residual_multiplier": 0.3}, [[*attention(IN), *swiglu(POST)]]),
    "glm": ("glm", {**GQA, "head_dim": 8}, [[*attention(IN), *fused_swiglu(POST)]]),
    "glm4": ("glm4", {**GQA, "head_dim": 8}, [[*attention(IN, writes=None), *fused_swiglu(POST, writes=None)]]),
    "starcoder2": ("starcoder2", GQA, [[*attention(IN), *gelu(POST, "mlp.c_fc", "mlp.c_proj")]]),
    "smollm3": ("smollm3", GQA, [[*attention(IN), *swiglu(POST)]]),
    "nemotron": (  # its activation is squared, which keeps no scale
        "nemotron",
        GQA,
        [
            [
                *attention(IN, offset=1.0),
                row("mlp.up_proj", POST, writes="ffn", offset=1.0),
                row("mlp.down_proj", None, reads="ffn"),
            ]
        ],
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **GQA,
            **EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        [
            *[
                [
                    row("linear_attn.in_proj_qkvz in_proj_ba", IN, "linear_attn", writes="inner", offset=1.0),
                    row("linear_attn.out_proj", None, reads="inner"),
                    *QWEN3_NEXT,
                ]
            ]
            * 3,
            [
                *attention(IN, offset=1.0),
                *QWEN3_NEXT,
            ],
        ],
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **TINY,
            **EXPERTS,
            "intermediate_size": 48,
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
        },
        [
            [*MLA, *swiglu(POST)],
            [*MLA, *mixture(POST, shared="mlp.shared_experts")],
        ],
    ),
    "mixtral": ("mixtral", {**GQA, "num_local_experts": 4}, [[*attention(IN), *mixture(POST)]]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_undeclared_family_is_found(name):
    model_type, values, expected = FAMILIES[name]
    found = found_in(model_type, **values)
    blocks = expected if len(expected) == len(found.blocks) else expected * len(found.blocks)
    assert found.problem is None
    for facts, own in zip(found.blocks, blocks, strict=True):
        assert facts.problem is None
        assert list(facts.subsets) == own


def test_the_adapter_of_a_discovered_model_serves_its_blocks():
    model_type, values, expected = FAMILIES["qwen3_next"]
    config = AutoConfig.for_model(model_type, **values)
    adapter = explore(config, trust_remote_code=False).adapter()
    blocks = empty_model(config, torch.float32).get_submodule(adapter.blocks)
    assert [list(own) for own in adapter.block_subsets(config, blocks)] == expected
    assert adapter.heads(config) == Heads(4, 2, 8) and adapter.residual is None


@pytest.mark.parametrize(
    ("name", "heads"), [("falcon-7b", Heads(4, 1, 8)), ("falcon-40b", Heads(4, 2, 8)), ("gpt_bigcode", Heads(4, 1, 8))]
)
def test_shared_value_heads_are_counted_whatever_the_configuration_calls_them(name, heads):
    model_type, values, _ = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **values)
    assert explore(config, trust_remote_code=False).adapter().heads(config) == heads


def test_why_nothing_absorbs_a_scale_is_said():
    reasons = {name: found_in(FAMILIES[name][0], **FAMILIES[name][1]).blocks[0].reasons for name in ("bloom", "olmo2")}
    assert "mlp.dense_h_to_4h" in reasons["bloom"]["mlp.dense_4h_to_h"]
    assert "reads the residual itself" in reasons["olmo2"]["mlp.gate_proj+mlp.up_proj"]
    facts = found_in(*FAMILIES["qwen3_next"][:1], **FAMILIES["qwen3_next"][1]).blocks[0]
    assert "share a weight of linear_attn.norm" in facts.reasons["linear_attn.out_proj"]
    assert not facts.loose


def test_a_block_that_was_not_discovered_is_refused():
    config = AutoConfig.for_model("gpt2", **GPT)
    adapter = explore(config, trust_remote_code=False).adapter()
    blocks = empty_model(config, torch.float32).get_submodule(adapter.blocks)
    with pytest.raises(ModelError, match="isn't among those that were discovered"):
        adapter.subsets(config, blocks[0].attn)


def test_the_head_is_what_runs_behind_the_blocks():
    assert found_in("bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4).head == ("transformer.ln_f", "lm_head")


# --- what can't be told ----------------------------------------------------------------------------------------------

GEMMA3N = {
    **GQA,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
}


def test_several_residuals_are_refused_with_the_reason():
    found = found_in("gemma3n_text", **GEMMA3N)
    assert found.blocks == ()
    with pytest.raises(ModelError, match="the hidden state has 4 dimensions"):
        found.adapter()
