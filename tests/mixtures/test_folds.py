"""What is folded or rotated in a mixture leaves its output as it was, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import CONFIGS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmc.errors import ModelError
from llmc.linalg import OnlineRotation, hadamard, make_rotation
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
from llmc.models.experts import linearize_experts
from llmc.models.mixture import split

ROTATED = [name for name in CONFIGS if name != "qwen3-next"]


class Doubled(TorchFunctionMode):
    """Whatever a model computes in float32 on purpose (norms, routers, linear attention) is computed in float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if one is torch.float32 else one for one in args)
        kwargs = {key: torch.float64 if one is torch.float32 else one for key, one in (kwargs or {}).items()}
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with torch.no_grad(), Doubled():
        yield


def model_of(family: str) -> PreTrainedModel:
    """Random weights in float64, experts as Linears."""
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float64).eval()
    linearize_experts(model)
    generator = torch.Generator().manual_seed(0)
    stored = model.state_dict()
    buffers = [tensor for name, tensor in model.named_buffers() if name in stored]
    for tensor in (*model.parameters(), *buffers):
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3
    return model


def routers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith(("TopKRouter", "TopkRouter"))]


def outputs(model: PreTrainedModel) -> tuple[Tensor, list[Tensor]]:
    """Logits, and which experts each router chose for each token, in no order."""
    chosen: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _, args, output: chosen.append(output[-1].sort(-1).values))
        for router in routers(model)
    ]
    logits = model(torch.randint(208, (2, 9), generator=torch.Generator().manual_seed(1)), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, chosen


def change(before: tuple[Tensor, list[Tensor]], after: tuple[Tensor, list[Tensor]]) -> float:
    """Largest difference, relative to the largest value. The routing must be the same."""
    assert len(before[1]) == len(after[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True)), "the routing has changed"
    assert before[0].dtype == torch.float64
    return ((after[0] - before[0]).abs().max() / before[0].abs().max()).item()


def adapter_of(family: str) -> ModelAdapter:
    return find_adapter("auto", CONFIGS[family].model_type)


def folds(family: str, model: PreTrainedModel, block: int) -> list[Subset]:
    """What can absorb a scale: of experts' last Linears, each by itself."""
    adapter = adapter_of(family)
    subsets = adapter.subsets(CONFIGS[family], model.get_submodule(adapter.blocks)[block])
    parts = [part for one in subsets for part in (split(one) if one.prev and "*" in one.prev else (one,))]
    return [part for part in parts if part.prev is not None]


def fold(family: str, model: PreTrainedModel, block: int, subset: Subset, stored: torch.dtype, seed: int) -> None:
    """Fold random scales between 1/4 and 4, as a run does."""
    adapter, inside = adapter_of(family), model.get_submodule(adapter_of(family).blocks)[block]
    prev = inside.get_submodule(subset.prev or "")
    linears = [inside.get_submodule(name) for name in subset.linears]
    columns = linears[0].weight.shape[1]
    rule = scale_rule(subset, prev, columns, adapter.heads(CONFIGS[family]), allow_gqa=True)
    assert rule is not None, subset.prev
    exponents = torch.rand(columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 - 2
    readers = [*linears, *map(inside.get_submodule, subset.also)]
    before = [reader.weight.clone() for reader in (prev, *readers)]
    fold_scale(prev, readers, rule.tie(torch.exp2(exponents)), rule, stored)
    for old, reader in zip(before, (prev, *readers), strict=True):
        assert not torch.equal(old, reader.weight), "everybody takes part"


CASES = [
    pytest.param(name, block, index, id=f"{name}-{block}-{part.prev}-{part.inspect}")
    for name in CONFIGS
    for model in [model_of(name)]
    for block in range(2)
    for index, part in enumerate(folds(name, model, block))
]


@pytest.mark.parametrize(("family", "block", "index"), CASES)
def test_folding_a_scale_preserves_the_model(family, block, index):
    model = model_of(family)
    before = outputs(model)
    subset = folds(family, model, block)[index]
    fold(family, model, block, subset, torch.bfloat16, seed=index)
    assert change(before, outputs(model)) < 1e-10


def test_all_folds_go_together(family):
    model = model_of(family)
    before = outputs(model)
    for block in range(2):
        for seed, subset in enumerate(folds(family, model, block)):
            fold(family, model, block, subset, torch.bfloat16, seed)
    assert change(before, outputs(model)) < 1e-10


def test_what_absorbs_a_scale(family):
    """All that can: both norms and, of a narrow attention, those inside it, values, and each expert's ``up``."""
    model = model_of(family)
    prevs = {subset.prev for subset in folds(family, model, 1)}
    assert {f"mlp.experts.{index}.up_proj" for index in range(4)} | {"input_layernorm"} <= prevs
    assert "post_attention_layernorm" in prevs
    narrow = {"deepseek-v2": {"self_attn.kv_a_layernorm"}, "deepseek-v3": {"self_attn.q_a_layernorm"}}
    values = "self_attn.kv_b_proj" if family.startswith("deepseek") else "self_attn.v_proj"
    assert narrow.get(family, set()) <= prevs
    assert values in prevs


@pytest.mark.parametrize("left_out", ["mlp.gate", "mlp.shared_expert_gate", "mlp.experts.3.gate_proj"])
def test_whoever_reads_the_norm_and_is_left_out_changes_the_model(left_out):
    model = model_of("qwen2-moe")
    before = outputs(model)[0]
    block = model.model.layers[1]
    kept = block.get_submodule(left_out).weight.clone()
    subset = next(one for one in folds("qwen2-moe", model, 1) if one.prev == "post_attention_layernorm")
    fold("qwen2-moe", model, 1, subset, torch.float64, seed=0)
    block.get_submodule(left_out).weight.copy_(kept)
    assert (outputs(model)[0] - before).abs().max() / before.abs().max() > 1e-4


def rotate(family: str, model: PreTrainedModel, *, random: bool, online: OnlineRotation | None = None) -> None:
    """What a run does to a model, with all of it in memory."""
    config, adapter = CONFIGS[family], adapter_of(family)
    blocks = model.get_submodule(adapter.blocks)
    subsets = adapter.block_subsets(config, blocks)
    declared = residual_of(adapter, config, {subset for own in subsets for subset in own})
    rotation = make_rotation(config.hidden_size, 0, random=random, keeps_mean=declared.keeps_mean)
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    edges = [name for name in weights if not name.startswith(f"{adapter.blocks}.")]
    behind = {name for name in edges if any(name.startswith(f"{part}.") for part in adapter.head)}
    front = rotate_embedding({name: weights[name] for name in edges if name not in behind}, declared, rotation)
    head = rotate_head({name: weights[name] for name in behind}, declared, rotation)
    for name, tensor in {**front, **head}.items():
        model.get_parameter(name).data = tensor
    heads = adapter.heads(config)
    for index, (block, own) in enumerate(zip(blocks, subsets, strict=True)):
        rotate_block(block, own, heads, rotation, make_rotation(heads.dim, 1 + index, random=random), online)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("family", ROTATED)
def test_a_rotated_model_computes_what_it_did(family, random):
    model = model_of(family)
    before = outputs(model)
    kept = {name: tensor.clone() for name, tensor in model.named_parameters()}
    rotate(family, model, random=random)
    assert change(before, outputs(model)) < 1e-10
    untouched = {name.split(".", 3)[-1] for name, tensor in model.named_parameters() if torch.equal(kept[name], tensor)}
    inside = ("q_norm.weight", "k_norm.weight", "q_a_layernorm.weight", "kv_a_layernorm.weight", "q_b_proj.weight")
    assert all(name.endswith((*inside, "q_proj.bias", "k_proj.bias")) for name in untouched), untouched


@pytest.mark.parametrize("family", ROTATED)
def test_a_rotated_model_can_still_be_scaled(family):
    model = model_of(family)
    before = outputs(model)
    rotate(family, model, random=True)
    for block in range(2):
        for seed, subset in enumerate(folds(family, model, block)):
            fold(family, model, block, subset, torch.float64, seed)
    assert change(before, outputs(model)) < 1e-10


def test_the_experts_last_linears_undo_what_rotates_their_inputs():
    model = model_of("qwen3-moe")
    before = outputs(model)
    rotate("qwen3-moe", model, random=False, online=OnlineRotation(hadamard(64)))
    dense = hadamard(64).matrix().double() / 8
    for path, module in model.named_modules():
        if path.endswith("down_proj"):
            module.register_forward_pre_hook(lambda _, args: (args[0] @ dense,))
    assert change(before, outputs(model)) < 1e-10


def test_what_can_not_be_rotated_is_refused_with_the_reason():
    with pytest.raises(ModelError, match="Qwen3-Next can't be rotated: its attention multiplies"):
        rotate("qwen3-next", model_of("qwen3-next"), random=False)
