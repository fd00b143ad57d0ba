"""What a layout joins it splits again, and it names, shapes and orders things as Transformers' own checkpoints do."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    PreTrainedConfig,
    Qwen3VLMoeConfig,
)
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from llmc.models.layouts import FusedExperts, layout_of
from llmc.models.linearize import linearize

EXPERTS, HIDDEN, INNER = 3, 16, 8
SHAPE = {"vocab_size": 32, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt_oss": GptOssConfig(
        **SHAPE, num_hidden_layers=1, intermediate_size=INNER, num_local_experts=EXPERTS, layer_types=["full_attention"]
    ),
    "llama4_text": Llama4TextConfig(
        **SHAPE,
        num_hidden_layers=1,
        intermediate_size=INNER,
        intermediate_size_mlp=24,
        num_local_experts=EXPERTS,
        interleave_moe_layer_step=1,
        moe_layers=[0],
    ),
}
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": HIDDEN}


def stored(config: PreTrainedConfig, folder) -> dict[str, torch.Tensor]:
    """What Transformers writes, with random values everywhere."""
    torch.manual_seed(0)
    if config.model_type == "qwen3_vl_moe":
        model = Qwen3VLMoeForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def qwen3_vl() -> PreTrainedConfig:
    text = {**SHAPE, "num_hidden_layers": 1, "intermediate_size": 24, "moe_intermediate_size": INNER}
    text |= {"num_experts": EXPERTS, "num_experts_per_tok": 1, "decoder_sparse_step": 1}
    return Qwen3VLMoeConfig(text_config=text, vision_config=VISION)


@pytest.fixture(params=["gpt_oss", "llama4_text", "qwen3_vl_moe", "gpt2"])
def checkpoint(request, tmp_path):
    config = CONFIGS.get(request.param) or (
        qwen3_vl() if request.param != "gpt2" else GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_inner=24)
    )
    return config, stored(config, tmp_path)


def test_what_is_split_is_joined_again(checkpoint):
    config, tensors = checkpoint
    layout = layout_of(config.model_type)
    parts = [layout.split(name, tensor) or {name: tensor} for name, tensor in tensors.items()]
    split = {name: part for own in parts for name, part in own.items()}
    changed = [name for name, tensor in split.items() if name not in tensors or tensor is not tensors[name]]
    assert changed
    assert {layout.holder(name) for name in split} == tensors.keys()
    joined = layout.join(split)
    assert joined.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(joined[name], tensor), name
        assert joined[name].is_contiguous()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_experts_linears_compute_what_the_module_does(name, tmp_path):
    """One expert of the model's own module against plain Linears with what was split, in float64."""
    config = CONFIGS[name]
    tensors = stored(config, tmp_path)
    layout = layout_of(config.model_type)
    split = {own: p.double() for key, t in tensors.items() for own, p in (layout.split(key, t) or {}).items()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    module = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    prefix = next(own for own in split).partition(".experts.")[0] + ".experts"
    x, chosen = torch.randn(5, HIDDEN, dtype=torch.float64), 1
    names = {of: f"{prefix}.{chosen}.{of}_proj" for of in ("gate", "up", "down")}
    parts = {of: (split[f"{at}.weight"], split.get(f"{at}.bias")) for of, at in names.items()}
    gate, up = (nn.functional.linear(x, *parts[of]) for of in ("gate", "up"))
    if name == "gpt_oss":
        limit, alpha = 7.0, 1.702
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        inner = (up + 1) * gate * torch.sigmoid(gate * alpha)
        index = torch.full((5, 1), chosen)
        own = module(x, index, torch.ones(5, 1, dtype=torch.float64))
    else:
        inner = up * nn.functional.silu(gate)
        own = module(x.repeat(EXPERTS, 1)).reshape(EXPERTS, 5, HIDDEN)[chosen]
    torch.testing.assert_close(nn.functional.linear(inner, *parts["down"]), own, rtol=1e-10, atol=1e-10)


def test_a_missing_expert_is_noticed():
    layout = FusedExperts()
    parts = {f"x.experts.{index}.down_proj.weight": torch.ones(2, 3) for index in (0, 2)}
    with pytest.raises(ValueError, match=r"x\.experts\.down_proj: an expert in front of 2 has no down_proj"):
        layout.join(parts)
    with pytest.raises(ValueError, match="only gate of it"):
        layout.join({"x.experts.0.gate_proj.weight": torch.ones(2, 3)})


def test_other_architectures_have_no_layout_of_their_own():
    assert layout_of("llama") is None


def test_a_conv1d_becomes_a_linear_of_the_same_shape():
    with torch.device("meta"):
        model = nn.Sequential(nn.Sequential(Conv1D(6, 4)), nn.LayerNorm(6)).to(torch.bfloat16)
    linearize(model)
    linear = model.get_submodule("0.0")
    assert type(linear) is nn.Linear
    assert (linear.weight.shape, linear.weight.dtype, linear.weight.is_meta) == ((6, 4), torch.bfloat16, True)
    assert linear.bias.shape == (6,) and isinstance(model[1], nn.LayerNorm)
