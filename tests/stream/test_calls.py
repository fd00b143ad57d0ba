"""Blocks called one at a time compute what the whole model computes."""

from __future__ import annotations

import pytest
import torch
from tiny import token_losses
from torch import nn
from transformers import LlamaModel

from llmc.errors import ModelError
from llmc.stream.batch import Batch
from llmc.stream.calls import Recorded
from llmc.stream.calls import record as record_batch
from llmc.stream.skeleton import EMBED, HEAD

LENGTH = 24  # longer than mistral's window


def record(skeleton, ids) -> Recorded:
    return record_batch(skeleton, Batch(ids), torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def embedded(tiny):
    """A skeleton with nothing but its embedding."""
    skeleton = tiny.skeleton()
    skeleton.load(tiny.source(skeleton).take(EMBED))
    return skeleton


def with_head(tiny):
    """A skeleton with nothing but its head, and the embedding if the head is tied to it."""
    skeleton = tiny.skeleton()
    source = tiny.source(skeleton)
    skeleton.load(source.take(HEAD) | (source.take(EMBED) if skeleton.tied_head else {}))
    if skeleton.tied_head:
        skeleton.tie()
    return skeleton


def watched_forward(tiny, ids):
    """The whole model's block inputs, block outputs and logits."""
    model = tiny.model()
    inputs, outputs = [], []
    for block in model.get_submodule(tiny.adapter.blocks):
        block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(args[0]), with_kwargs=True)
        block.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    logits = model(input_ids=ids, use_cache=False).logits
    return inputs, outputs, logits


@pytest.mark.parametrize("batch", [1, 2])
def test_replaying_the_blocks_equals_the_whole_forward_bit_for_bit(tiny, embedded, tokens, batch):
    ids = tokens(batch, LENGTH)
    inputs, outputs, _ = watched_forward(tiny, ids)
    recorded = record(embedded, ids)
    source = tiny.source(embedded)
    hidden = recorded.hidden
    assert torch.equal(hidden, inputs[0])
    for index, (block, call, expected) in enumerate(zip(embedded.blocks, recorded.calls, outputs, strict=True)):
        embedded.load(source.take(f"block-{index}"))
        hidden = call(block, hidden)
        embedded.release(block)
        assert torch.equal(hidden, expected), index
    source.close()


def test_recording_needs_no_weight_of_a_block_and_leaves_the_blocks_in_place(tiny, embedded, tokens):
    blocks = list(embedded.blocks)
    record(embedded, tokens(1, LENGTH))
    assert all(now is before for now, before in zip(embedded.blocks, blocks, strict=True))
    assert all(parameter.is_meta for parameter in embedded.blocks.parameters())


def test_the_sliding_window_is_part_of_the_call(checkpoint, tokens):
    skeleton = checkpoint("mistral").loaded()
    mask = record(skeleton, tokens(1, LENGTH)).calls[0].kwargs["attention_mask"]
    seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    assert seen.sum(-1).tolist() == [min(position + 1, 8) for position in range(LENGTH)]


def test_losses_equal_the_cross_entropy_of_the_whole_model(tiny, tokens):
    ids = tokens(2, LENGTH)
    _, outputs, logits = watched_forward(tiny, ids)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    found = token_losses(with_head(tiny), outputs[-1], ids)
    assert found.shape == (2, LENGTH - 1)
    assert found.dtype == torch.float32
    assert torch.allclose(found.flatten(), expected, rtol=1e-6, atol=1e-6)


def test_the_model_works_as_before_after_its_head_was_run(tiny, tokens):
    ids = tokens(1, LENGTH)
    _, outputs, logits = watched_forward(tiny, ids)
    skeleton = tiny.loaded()
    token_losses(skeleton, outputs[-1], ids)
    assert torch.equal(skeleton.model(input_ids=ids, use_cache=False).logits, logits)


def test_code_between_two_blocks_is_refused(llama, tokens, monkeypatch):
    def between(self, input_ids, **kwargs):
        hidden = self.embed_tokens(input_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if index == 1:
                hidden = hidden + 0

    monkeypatch.setattr(LlamaModel, "forward", between)
    with pytest.raises(ModelError, match="changes the hidden state in front of block 2"):
        record(llama.loaded(), tokens(1, LENGTH))


def test_a_skipped_block_is_refused(llama, tokens, monkeypatch):
    def skipping(self, input_ids, **kwargs):
        hidden = self.embed_tokens(input_ids)
        for layer in [*self.layers[:2], self.layers[3]]:
            hidden = layer(hidden)

    monkeypatch.setattr(LlamaModel, "forward", skipping)
    with pytest.raises(ModelError, match="block 2"):
        record(llama.loaded(), tokens(1, LENGTH))


def test_a_model_that_never_calls_its_blocks_is_refused(llama, tokens, monkeypatch):
    skeleton = llama.loaded()
    monkeypatch.setattr(skeleton.model, "forward", lambda **kwargs: None)
    with pytest.raises(ModelError, match="never called its blocks"):
        record(skeleton, tokens(1, LENGTH))


def test_a_failing_forward_leaves_the_model_as_it_was(llama, tokens):
    skeleton = llama.loaded()
    blocks = list(skeleton.blocks)
    wrong = tokens(1, LENGTH) + 10_000
    with pytest.raises(IndexError):
        record(skeleton, wrong)
    with pytest.raises(IndexError):
        token_losses(skeleton, torch.zeros(1, LENGTH, 64), wrong)
    assert all(now is before for now, before in zip(skeleton.blocks, blocks, strict=True))
    assert not any("forward" in vars(module) for module in skeleton.model.modules())
