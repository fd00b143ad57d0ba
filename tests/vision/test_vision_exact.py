"""Folds and rotations leave what a vision-language model computes of an image as it was, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_vision import CONFIGS, image_sample
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from llmc.errors import ModelError
from llmc.linalg import make_rotation
from llmc.models import (
    find_adapter,
    fold_scale,
    heads_of,
    residual_of,
    rotate_block,
    rotate_embedding,
    rotate_head,
    scale_rule,
)


class ExactNorm(nn.Module):
    """An RMSNorm in float64 throughout: Transformers' goes through float32, where an error below 1e-7 would hide."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def model_of(name: str) -> PreTrainedModel:
    """Random weights, biases, norms and gates, no signs preferred."""
    auto: Any = AutoModelForImageTextToText
    model = auto.from_config(CONFIGS[name], dtype=torch.float64, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(path, ExactNorm(module))
    return model


def logits(model: PreTrainedModel, name: str) -> Tensor:
    inputs = {key: t.double() if t.is_floating_point() else t for key, t in image_sample(name).inputs.items()}
    return model(**inputs, use_cache=False).logits


def change(before: Tensor, after: Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_declared_fold_preserves_the_output(name):
    model = model_of(name)
    adapter, config = find_adapter("auto", name), model.config.get_text_config()
    before, folded = logits(model, name), 0
    for block in model.get_submodule(adapter.blocks):
        for seed, subset in enumerate(adapter.subsets(config, block)):
            if subset.prev is None:
                continue
            prev, linears = block.get_submodule(subset.prev), [block.get_submodule(one) for one in subset.linears]
            rule = scale_rule(subset, prev, linears[0].in_features, adapter.heads(config), allow_gqa=True)
            generator = torch.Generator().manual_seed(seed)
            scale = torch.rand(linears[0].in_features, generator=generator, dtype=torch.float64) + 0.5
            kept = linears[0].weight.clone()
            fold_scale(prev, linears, rule.tie(scale), rule, torch.float64)
            assert change(kept, linears[0].weight) > 0.1
            folded += 1
    assert folded == 12
    assert change(before, logits(model, name)) < 1e-10


def test_the_declared_linears_read_one_tensor(vision):
    for name in CONFIGS:
        model = vision(name).model()
        adapter, config = find_adapter("auto", name), model.config.get_text_config()
        seen: dict[str, Tensor] = {}
        for path, module in model.get_submodule(adapter.blocks).named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args, path=path, seen=seen: seen.update({path: args[0]}))
        model(**image_sample(name).inputs, use_cache=False)
        declared = set()
        for index, block in enumerate(model.get_submodule(adapter.blocks)):
            for subset in adapter.subsets(config, block):
                paths = [f"{index}.{one}" for one in subset.linears]
                assert all(seen[path] is seen[paths[0]] for path in paths), paths
                declared |= set(paths)
        assert declared == seen.keys()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gemma3"])
def test_a_rotated_model_computes_what_it_did_of_an_image(name):
    model = model_of(name)
    adapter, config = find_adapter("auto", name), model.config.get_text_config()
    subsets = [adapter.subsets(config, block) for block in model.get_submodule(adapter.blocks)]
    declared = residual_of(adapter, config, {subset for own in subsets for subset in own})
    before, heads = logits(model, name), heads_of(config)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    edges = [key for key in weights if not key.startswith(f"{adapter.blocks}.")]
    behind = {key for key in edges if key.startswith(tuple(f"{part}." for part in adapter.head))}
    rotation = make_rotation(config.hidden_size, 0, random=True)
    front = rotate_embedding({key: weights[key] for key in edges if key not in behind}, declared, rotation)
    for key, tensor in (front | rotate_head({key: weights[key] for key in behind}, declared, rotation)).items():
        owner, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    for index, block in enumerate(model.get_submodule(adapter.blocks)):
        rotate_block(block, subsets[index], heads, rotation, make_rotation(heads.dim, 1 + index, random=True))
    assert change(before, logits(model, name)) < 1e-10
    touched = {key for key in edges if not torch.equal(weights[key], model.state_dict()[key])} - behind
    assert len(touched) == {"mllama": 1, "llava_onevision": 4, "qwen3_vl": 7}.get(name, 3)


def test_gemma_says_why_it_cannot_be_rotated():
    with pytest.raises(ModelError, match="a norm stands behind each branch"):
        residual_of(find_adapter("auto", "gemma3"), CONFIGS["gemma3"].get_text_config(), ())
