"""Block by block, a vision-language model is loaded and run as Transformers does it at once."""

from __future__ import annotations

from collections import Counter

import torch
from tiny import token_losses
from tiny_vision import BLOCKS, IMAGE, image_sample, text_sample
from torch import nn

from llmc.stream.calls import record
from llmc.stream.skeleton import EMBED, HEAD

CPU = torch.device("cpu")


def streamed(tiny, sample):
    """Outputs of the blocks, each loaded on its own and called as recorded."""
    skeleton = tiny.skeleton()
    source = tiny.source(skeleton)
    skeleton.load(source.take(EMBED))
    recorded = record(skeleton, sample.batch, CPU)
    skeleton.release_unit(EMBED)
    hidden, inputs, outputs = recorded.hidden, [], []
    for index, (block, call) in enumerate(zip(skeleton.blocks, recorded.calls, strict=True)):
        skeleton.load(source.take(f"block-{index}"))
        inputs.append(hidden)
        hidden = call.waiting(CPU, {})(block, hidden)
        outputs.append(hidden)
        skeleton.release(block)
    source.close()
    return recorded, inputs, outputs


def whole(tiny, sample):
    """The same of the whole model, by block; blocks that it doesn't call are missing. And its logits."""
    model, inputs, outputs = tiny.model(), {}, {}
    for index, block in enumerate(model.get_submodule(tiny.adapter.blocks)):
        block.register_forward_pre_hook(lambda _, args, index=index: inputs.update({index: args[0]}))
        block.register_forward_hook(lambda _, args, out, index=index: outputs.update({index: out}))
    logits = model(**sample.inputs, use_cache=False).logits
    return inputs, outputs, logits


def test_replaying_the_blocks_with_an_image_equals_the_whole_forward_bit_for_bit(tiny):
    sample = image_sample(tiny.name)
    inputs, outputs, _ = whole(tiny, sample)
    recorded, _, found = streamed(tiny, sample)
    assert torch.equal(recorded.hidden, inputs[0])
    assert len(outputs) == len(found) == BLOCKS
    for index, output in outputs.items():
        assert torch.equal(found[index], output), index


def test_the_image_matters_to_every_block(tiny):
    one, other = (image_sample(tiny.name, seed) for seed in (0, 1))
    other = type(one)(one.tokens, {**other.further})
    (_, _, left), (_, _, right) = streamed(tiny, one), streamed(tiny, other)
    first = 1 if tiny.name == "mllama" else 0  # its image enters at the second block
    assert [torch.equal(a, b) for a, b in zip(left, right, strict=True)] == [i < first for i in range(BLOCKS)]


def test_replaying_the_blocks_with_text_equals_the_whole_forward_bit_for_bit(tiny):
    sample = text_sample()
    _, outputs, _ = whole(tiny, sample)
    recorded, inputs, found = streamed(tiny, sample)
    for index in range(BLOCKS):
        if index in outputs:
            assert torch.equal(found[index], outputs[index]), index
        else:
            assert recorded.calls[index].left_out
            assert torch.equal(found[index], inputs[index])
    assert set(range(BLOCKS)) - set(outputs) == ({1, 2} if tiny.name == "mllama" else set())


def test_losses_of_text_equal_the_cross_entropy_of_the_whole_model(tiny):
    sample = text_sample()
    _, outputs, logits = whole(tiny, sample)
    expected = nn.functional.cross_entropy(logits[0, :-1].float(), sample.tokens[0, 1:], reduction="none")
    skeleton = tiny.skeleton()
    source = tiny.source(skeleton)
    skeleton.load(source.take(HEAD) | (source.take(EMBED) if skeleton.tied_head else {}))
    if skeleton.tied_head:
        skeleton.tie()
    found = token_losses(skeleton, outputs[max(outputs)], sample.tokens)
    source.close()
    assert torch.allclose(found[0], expected, rtol=1e-6, atol=1e-6)


def test_loading_unit_by_unit_equals_from_pretrained(tiny):
    expected = tiny.model().state_dict()
    skeleton = tiny.skeleton()
    source = tiny.source(skeleton)
    for unit in skeleton.units:
        skeleton.load(source.take(unit))
    skeleton.tie()
    loaded = skeleton.model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert Counter(source.reads) == Counter(tiny.entries.keys())
    source.close()


def test_encoder_and_projector_stand_in_front_of_the_blocks(tiny):
    skeleton = tiny.skeleton()
    placed = {unit: {skeleton.parameter_of[name] for name in names} for unit, names in skeleton.units.items()}
    for unit, names in placed.items():
        path = f"{tiny.adapter.blocks}.{unit.removeprefix('block-')}."
        if unit.startswith("block-"):
            assert all(name.startswith(path) for name in names)
    assert any("vis" in name for name in placed[EMBED])
    assert not any("vis" in name or "project" in name for name in placed[HEAD])


def test_only_families_whose_adapter_says_so_may_add_something_between_blocks(vision):
    tiny, sample = vision("qwen3_vl"), image_sample("qwen3_vl")
    skeleton = tiny.skeleton()
    source = tiny.source(skeleton)
    skeleton.load(source.take(EMBED))
    source.close()
    recorded = record(skeleton, sample.batch, CPU)
    added = [call.added for call in recorded.calls]
    assert [one is None for one in added] == [True, False, False]  # behind blocks 0 and 1
    for one in added[1:3]:
        touched = (one != 0).any(-1)[0]
        assert torch.equal(touched, sample.tokens[0] == IMAGE)
