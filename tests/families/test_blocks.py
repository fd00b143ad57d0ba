"""What an adapter declares is true of the model's code, and blocks called one at a time are the whole model."""

from __future__ import annotations

import pytest
import torch
from tiny import recorded, token_losses
from torch import nn

from llmc.stream.skeleton import EMBED, HEAD

LENGTH = 12  # longer than windows and chunks of attention


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("batch", [1, 2])
def test_replaying_the_blocks_equals_the_whole_forward_bit_for_bit(family, tokens, batch):
    ids, model = tokens(batch, LENGTH), family.model()
    outputs = []
    for block in model.get_submodule(family.adapter.blocks):
        block.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    logits = model(input_ids=ids, use_cache=False).logits
    skeleton = family.skeleton()
    source = family.source(skeleton)
    embedding = source.take(EMBED)
    skeleton.load(embedding)
    seen = recorded(skeleton, ids)
    skeleton.release_unit(EMBED)
    hidden = seen.hidden
    assert type(hidden) is torch.Tensor
    for index, (block, call, expected) in enumerate(zip(skeleton.blocks, seen.calls, outputs, strict=True)):
        skeleton.load(source.take(f"block-{index}"))
        hidden = call(block, hidden)
        skeleton.release(block)
        assert torch.equal(hidden, expected), index
    skeleton.load(source.take(HEAD) | (embedding if skeleton.tied_head else {}))
    if skeleton.tied_head:
        skeleton.tie()
    source.close()
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(token_losses(skeleton, hidden, ids).flatten(), losses, rtol=1e-6, atol=1e-6)


def test_loading_unit_by_unit_equals_from_pretrained(family):
    expected, skeleton = family.model().state_dict(), family.loaded()
    loaded = skeleton.model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert sorted(name for unit in skeleton.units.values() for name in unit) == sorted(family.entries)


def test_the_linears_of_a_subset_read_one_tensor(family, tokens):
    """The very object; and whoever isn't in the subset reads another."""
    model = family.model()
    for subsets, block in zip(family.block_subsets, model.get_submodule(family.adapter.blocks), strict=True):
        reads: dict[str, torch.Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name, reads=reads: reads.update({name: args[0]}))
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        ]
        model(input_ids=tokens(1, LENGTH), use_cache=False)
        order = list(reads)
        shared = [{id(reads[name]) for name in (*subset.linears, *subset.also)} for subset in subsets]
        assert all(len(tensors) == 1 for tensors in shared)
        assert len(set.union(*shared)) == len(subsets)
        # Each Linear once, in the order in which the block comes to the subsets.
        named = [name for subset in subsets for name in subset.linears]
        assert sorted(named) == sorted(order)
        firsts = [min(map(order.index, subset.linears)) for subset in subsets]
        assert firsts == sorted(firsts)
        for hook in hooks:
            hook.remove()


def test_what_a_subset_names_is_there(family):
    block, heads = family.skeleton().blocks[0], family.adapter.heads(family.config)
    for subset in family.subsets:
        inspected = list(block.get_submodule(subset.inspect).modules())
        linears = [block.get_submodule(name) for name in subset.linears]
        assert all(any(linear is module for module in inspected) for linear in linears)
        assert subset.writes is not None
        assert sorted(name for group in subset.fused or (subset.linears,) for name in group) == sorted(subset.linears)
        made = 0 if subset.prev is None else len(block.get_submodule(subset.prev).weight)
        if subset.rows is not None:
            assert all(0 <= start < stop <= made for start, stop in subset.rows)
            made = sum(stop - start for start, stop in subset.rows)
        if subset.reads == "heads":
            assert linears[0].in_features == heads.query * heads.dim
            assert made == heads.kv * heads.dim
        elif subset.prev is not None:
            assert made == linears[0].in_features
