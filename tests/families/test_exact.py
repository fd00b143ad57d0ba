"""Folds and rotations leave every family's model as it was, in exact arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact import change, exactly, fold, logits, model_of, output_of, rotate
from family_configs import CONFIGS, NOT_ROTATED, REMOTE
from torch import nn
from transformers import PreTrainedModel

from llmc.errors import ModelError
from llmc.models import Subset, find_adapter, fold_shift, residual_of


def exact_model(name: str) -> PreTrainedModel:
    config = CONFIGS[name]
    return exactly(REMOTE[type(config)](config).double()) if type(config) in REMOTE else model_of(config)


def subsets_of(model: PreTrainedModel) -> tuple[Subset, ...]:
    """Of the first block."""
    adapter = find_adapter("auto", model.config.model_type)
    return adapter.subsets(model.config, model.get_submodule(adapter.blocks)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_fold_leaves_the_block_as_it_was(name):
    """One after the other, each on what the ones before left."""
    model = exact_model(name)
    before = output_of(model)
    block = model.get_submodule(find_adapter("auto", model.config.model_type).blocks)[0]
    folded = [subset for subset in subsets_of(model) if subset.prev is not None]
    for seed, subset in enumerate(folded):
        kept = {key: tensor.clone() for key, tensor in block.state_dict().items()}
        fold(model, subset, torch.bfloat16, seed)
        assert change(before, output_of(model)) < 1e-10, subset.key
        now = block.state_dict()
        changed = {key.rpartition(".")[0] for key in kept if not torch.equal(kept[key], now[key])}
        assert changed == {str(subset.prev), *subset.linears, *subset.also}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_part_of_a_declaration_is_needed(name):
    """The rows of another head, a norm's weight as it stands, a reader forgotten: each shows."""
    wrong = []
    for subset in subsets_of(exact_model(name)):
        if subset.prev is None:
            continue
        if subset.rows is not None:
            shift = subset.rows[0][1] - subset.rows[0][0]
            wrong.append(replace(subset, rows=tuple((start - shift, stop - shift) for start, stop in subset.rows)))
        if subset.offset:
            wrong.append(replace(subset, offset=0.0))
        wrong += [replace(subset, linears=subset.linears[:-1])] * (len(subset.linears) > 1)
    for subset in wrong:
        model = exact_model(name)
        before = output_of(model)
        fold(model, subset, torch.float64)
        assert change(before, output_of(model)) > 1e-4, subset


SHIFTED = (
    *("opt", "bloom", "falcon-rw", "phi", "phi-qk-norm", "gpt-neox", "gpt-neox-sequential", "bigcode", "bigcode-mha"),
    *("starcoder2", "chatglm-layernorm"),
)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shift_of_what_a_norm_writes_leaves_the_block_as_it_was(name):
    """Where norm and readers have biases, also those side by side behind it."""
    model = exact_model(name)
    before, shifted = output_of(model), 0
    block = model.get_submodule(find_adapter("auto", model.config.model_type).blocks)[0]
    for subset in subsets_of(model):
        readers = [block.get_submodule(linear) for linear in subset.linears]
        prev = None if subset.prev is None else block.get_submodule(subset.prev)
        biased = all(getattr(module, "bias", None) is not None for module in (prev, *readers))
        if subset.reads == "residual" and biased:
            shifted += 1
            width = readers[0].in_features
            shift = torch.randn(width, generator=torch.Generator().manual_seed(shifted), dtype=torch.float64)
            kept = prev.bias.clone()
            fold_shift(prev, readers, shift, torch.float64)
            assert change(kept, prev.bias) > 0.1
    assert change(before, output_of(model)) < 1e-10
    assert (shifted > 0) == (name in SHIFTED)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rotated_model_computes_what_it_did_or_is_refused(name):
    model = exact_model(name)
    if name in NOT_ROTATED:
        with pytest.raises(ModelError, match=NOT_ROTATED[name]) as refused:
            residual_of(find_adapter("auto", model.config.model_type), model.config, subsets_of(model))
        assert "method without a rotation" in refused.value.remedy
        return
    before = logits(model)
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rotate(model)
    assert change(before, logits(model)) < 1e-10
    after = model.state_dict()
    linears = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert all(not torch.equal(kept[f"{key}.weight"], after[f"{key}.weight"]) for key in linears)
