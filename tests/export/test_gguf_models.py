"""What llama.cpp must know of a model: names, numbers, the order of rows; and what it can't compute."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmc.errors import ExportError
from llmc.export.gguf_file import tensor_name
from llmc.export.gguf_models import (
    architecture_of,
    fields_of,
    limits_of,
    place_of,
    rope_divisors,
    rope_fields,
    turned_rows,
)
from llmc.stream.headers import read_headers

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
EXPERTS = {**SHAPE, "moe_intermediate_size": 32, "num_experts": 3, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=3),
    "qwen2_moe": Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_moe": Qwen3MoeConfig(**EXPERTS, head_dim=32, norm_topk_prob=True),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, query_pre_attn_scalar=16, sliding_window=32),
    "gemma3_text": Gemma3TextConfig(**SHAPE, head_dim=16, query_pre_attn_scalar=16, sliding_window=32),
    "phi3": Phi3Config(**{**SHAPE, "eos_token_id": 1}),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_stored_tensor_has_a_place_of_its_own(kind, tmp_path):
    config = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)  # under the names of a checkpoint: experts one by one
    found, names = architecture_of(config.to_dict()), list(read_headers(tmp_path))
    placed = {name: (tensor_name(found, 2, name), place_of(found, name).expert) for name in names}
    assert None not in {name for name, _ in placed.values()}
    assert len(set(placed.values())) == len(names)
    experts = {name: place for name, place in placed.items() if ".experts." in name}
    assert len({name for name, _ in experts.values()}) == (2 * 3 if experts else 0)
    assert {index for _, index in experts.values()} == ({0, 1, 2} if experts else set())


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.1.input_layernorm.weight", "blk.1.attn_norm.weight"),
        ("model.layers.1.self_attn.q_proj.bias", "blk.1.attn_q.bias"),
        ("model.layers.1.self_attn.o_proj.weight", "blk.1.attn_output.weight"),
        ("model.layers.1.post_attention_layernorm.weight", "blk.1.ffn_norm.weight"),
        ("model.layers.1.mlp.gate_proj.weight", "blk.1.ffn_gate.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.layers.2.mlp.down_proj.weight", None),
        ("visual.patch.weight", None),
    ],
)
def test_names_are_llama_cpps(original, expected):
    assert tensor_name(architecture_of(CONFIGS["llama"].to_dict()), 2, original) == expected


def test_the_numbers_are_the_models():
    numbers = fields_of(CONFIGS["qwen3"].to_dict())
    assert numbers == {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "vocab_size": 96,
    }
    keys = ("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length")
    for kind, expected in {
        "mixtral": [3, 2, None, None],
        "qwen2_moe": [3, 2, 32, 64],
        "qwen3_moe": [3, 2, 32, None],
    }.items():
        moe = fields_of(CONFIGS[kind].to_dict())
        assert [moe.get(key) for key in keys] == expected
    with pytest.raises(ExportError, match=r"config\.json has no num_local_experts"):
        fields_of({**CONFIGS["mixtral"].to_dict(), "num_local_experts": None})


def interleaved(x, angle):
    """llama.cpp's rotary embedding of architecture llama: channel 2i is turned with channel 2i + 1."""
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def halves(x, angle):
    """Transformers': channel i is turned with channel i + dim / 2."""
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_the_scores_of_attention_survive_the_order_of_rows(kv_heads):
    generator = torch.Generator().manual_seed(0)
    heads, dim, width, count = 6, 8, 20, 5
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    angle = torch.arange(count)[:, None, None] * torch.rand(dim // 2, generator=generator, dtype=torch.float64)
    found = architecture_of(CONFIGS["llama"].to_dict())
    scores = []
    for embed, turned in ((halves, False), (interleaved, True)):
        generator.manual_seed(1)
        sides = []
        for name, number in (("q_proj", heads), ("k_proj", kv_heads)):
            weight = torch.randn(number * dim, width, generator=generator, dtype=torch.float64)
            rows = turned_rows(found, f"model.layers.0.self_attn.{name}.weight", config)
            weight = weight[rows] if turned else weight
            sides.append(embed((x @ weight.T).reshape(count, number, dim), angle))
        query, key = sides
        key = key.repeat_interleave(heads // kv_heads, 1)
        scores.append(torch.einsum("qhd,khd->hqk", query, key))
    assert torch.allclose(*scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "phi3"])
def test_other_architectures_keep_their_rows(kind):
    config = CONFIGS[kind].to_dict()
    assert turned_rows(architecture_of(config), "model.layers.0.self_attn.q_proj.weight", config) is None


def test_only_queries_and_keys_change_places():
    config = CONFIGS["llama"].to_dict()
    found = architecture_of(config)
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"):
        assert turned_rows(found, f"model.layers.0.{name}.weight", config) is None
    rows = turned_rows(found, "model.layers.0.self_attn.k_proj.bias", config)
    assert sorted(rows.tolist()) == list(range(2 * 16))


def test_llama_3s_scaling_divides_the_frequencies_as_transformers_does():
    config = LlamaConfig(**SHAPE, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    (name, divisors), *others = rope_divisors(config.to_dict()).items()
    assert (name, others) == ("rope_freqs.weight", [])
    assert divisors.dtype == torch.float32
    assert torch.allclose(plain / divisors, scaled.double(), rtol=1e-6, atol=0)
    assert divisors.min() == 1
    assert divisors.max() == 8
    assert 1 < divisors[1] < 8
    assert rope_divisors(CONFIGS["llama"].to_dict()) == {}


def test_linear_and_yarn_scaling_are_named():
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert rope_fields(LlamaConfig(**SHAPE, rope_parameters=linear).to_dict()) == {
        "rope.freq_base": 1e4,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
    }
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 64}
    assert rope_fields(Qwen2Config(**SHAPE, rope_parameters=yarn).to_dict()) == {
        "rope.freq_base": 1e6,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 2.0,
        "rope.scaling.original_context_length": 64,
    }


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (OPTConfig(), "the architecture 'opt'"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act 'gelu'"),
        (Qwen3Config(**SHAPE, attention_bias=True), "attention_bias True"),
        (Qwen3MoeConfig(**EXPERTS, norm_topk_prob=False), "norm_topk_prob False"),
        (Qwen2MoeConfig(**EXPERTS, mlp_only_layers=[1]), r"mlp_only_layers \[1\]"),
        (Gemma2Config(**SHAPE, head_dim=16), "query_pre_attn_scalar 256"),
        (
            Gemma2Config(**SHAPE, head_dim=16, query_pre_attn_scalar=16, layer_types=["full_attention"] * 2),
            "block 0 has full_attention",
        ),
        (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
    ],
    ids=["opt", "activation", "bias", "router", "dense blocks", "scale", "windows", "rope"],
)
def test_what_llama_cpp_would_compute_differently_is_refused(config, problem):
    with pytest.raises(ExportError, match=problem) as error:
        architecture_of(config.to_dict())
    assert "save_llamacpp" in error.value.message
    assert "save_vllm" in error.value.remedy


def test_a_window_that_llama_cpp_does_not_know_limits_the_context():
    (warning,) = limits_of(MistralConfig(**SHAPE, sliding_window=32).to_dict())
    assert "the last 32" in warning
    for config in (
        MistralConfig(**SHAPE, sliding_window=None),
        MistralConfig(**SHAPE, sliding_window=128),
        Qwen2Config(**SHAPE, sliding_window=32, use_sliding_window=False),
        CONFIGS["gemma2"],
    ):
        assert limits_of(config.to_dict()) == []
