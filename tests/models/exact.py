"""What tests of function-preserving changes share: tiny models of every family, exact throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from llmc.linalg import OnlineRotation, make_rotation
from llmc.models import (
    ModelAdapter,
    Subset,
    find_adapter,
    fold_scale,
    residual_of,
    rotate_block,
    rotate_embedding,
    rotate_head,
    scale_rule,
)
from llmc.models.linearize import linearize

TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
ROTARY = {**TINY, "intermediate_size": 40, "max_position_embeddings": 64}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**ROTARY, num_key_value_heads=4),
    "llama-gqa": LlamaConfig(**ROTARY, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**ROTARY, num_key_value_heads=2, sliding_window=4),
    "qwen2": Qwen2Config(**ROTARY, num_key_value_heads=2),
    "qwen2-mha": Qwen2Config(**ROTARY, num_key_value_heads=4),
    "qwen3": Qwen3Config(**ROTARY, num_key_value_heads=2, head_dim=16),
    "opt": OPTConfig(**TINY, ffn_dim=40, max_position_embeddings=64, word_embed_proj_dim=32),
    "opt-post-norm": OPTConfig(
        **TINY, ffn_dim=40, max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_inner=40, n_positions=64),
}


def subsets_of(config: PretrainedConfig, block: int = 0) -> tuple[Subset, ...]:
    """What the adapter declares of a block."""
    adapter = find_adapter("auto", config.model_type)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return adapter.subsets(config, model.get_submodule(adapter.blocks)[block])


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    """A model of an architecture that Transformers has, with random weights, in float64 throughout."""
    return exactly(AutoModelForCausalLM.from_config(config, dtype=torch.float64))


def exactly(model: PreTrainedModel) -> PreTrainedModel:
    """Give a float64 model random weights, biases and norms, no signs preferred, and let it compute in ``Float64``."""
    linearize(model)
    forward = model.eval().forward

    def exact(*args: Any, **options: Any) -> Any:
        with Float64():
            return forward(*args, **options)

    model.forward = exact
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


class Float64(TorchFunctionMode):
    """Lets a float64 tensor stay one where Transformers' code goes through float32 (in norms, softmax, rotary
    embeddings), where an error below 1e-7 would hide."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        wide = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if wide and func is Tensor.float:
            return args[0]
        if wide and options.get("dtype") == torch.float32:
            del options["dtype"]
        if wide and func is Tensor.to:
            args = tuple(arg for arg in args if arg is not torch.float32)
            if len(args) == 1 and not options:
                return args[0]
        return func(*args, **options)


@torch.no_grad()
def rotate(
    model: PreTrainedModel,
    seed: int = 0,
    *,
    random: bool = False,
    online: OnlineRotation | None = None,
    adapter: ModelAdapter | None = None,
) -> None:
    """What a run does to a model, with all of it in memory."""
    config = model.config
    adapter = adapter or find_adapter("auto", config.model_type)
    blocks = model.get_submodule(adapter.blocks)
    declared = residual_of(adapter, config, adapter.subsets(config, blocks[0]))
    options = {"random": random, "keeps_mean": declared.keeps_mean}
    rotation = make_rotation(config.hidden_size, seed, **options)
    heads = adapter.heads(config)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edges = [name for name in weights if not name.startswith(f"{adapter.blocks}.")]
    behind = {name for name in edges if any(name.startswith(f"{part}.") for part in adapter.head)}
    front = rotate_embedding({name: weights[name] for name in edges if name not in behind}, declared, rotation)
    head = rotate_head({name: weights[name] for name in behind}, declared, rotation)
    for name, tensor in {**front, **head}.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    for index, block in enumerate(blocks):
        values = make_rotation(heads.dim, seed + 1 + index, random=random)
        rotate_block(block, adapter.subsets(config, block), heads, rotation, values, online)


@torch.no_grad()
def fold(model: PreTrainedModel, subset: Subset, stored: torch.dtype, seed: int = 0) -> None:
    """Fold random scales between 1/8 and 8 into a subset of the first block."""
    adapter = find_adapter("auto", model.config.model_type)
    block = model.get_submodule(adapter.blocks)[0]
    prev = block.get_submodule(subset.prev)
    columns = block.get_submodule(subset.linears[0]).weight.shape[1]
    rule = scale_rule(subset, prev, columns, adapter.heads(model.config), allow_gqa=True)
    exponents = torch.rand(columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 6 - 3
    readers = [block.get_submodule(name) for name in (*subset.linears, *subset.also)]
    fold_scale(prev, readers, rule.tie(torch.exp2(exponents)), rule, stored)


@torch.no_grad()
def output_of(model: PreTrainedModel) -> Tensor:
    """The first block's output in a run of the model's own code."""
    outputs = []
    block = model.get_submodule(find_adapter("auto", model.config.model_type).blocks)[0]
    hook = block.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits(model)
    hook.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Of some tokens."""
    return model(torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1)), use_cache=False).logits


def change(before: Tensor, after: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((after - before).abs().max() / before.abs().max()).item()
