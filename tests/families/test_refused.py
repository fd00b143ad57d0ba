"""What a family, or one of its models, doesn't allow is refused before a weight is read, with the reason."""

from __future__ import annotations

import pytest
import remote_code as remote
import torch
import transformers as t
from family_configs import BLOOM, CONFIGS, OWN_ATTENTION
from tiny import recorded, token_losses
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llmc.algorithms import awq
from llmc.errors import ModelError
from llmc.models import check_reorderable, find_adapter, residual_of
from llmc.stream.attention import CachedAttention, attending, check_attention


def subsets_of(config: PreTrainedConfig):
    """Of the first block."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapter = find_adapter("auto", config.model_type)
    return adapter.subsets(config, model.get_submodule(adapter.blocks)[0])


@torch.no_grad()
def test_attention_is_exchanged_where_it_can_be(family, tokens):
    """Token by token with a cache, it is what it was."""
    model = family.model()
    if family.name not in OWN_ATTENTION:
        check_attention(model)
        ids = tokens(2, 12)
        expected = model(input_ids=ids, use_cache=False).logits
        with attending(model, CachedAttention(None, decode=True)):
            found = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(ModelError, match="attention of this model") as refused:
        check_attention(model)
    assert "quant.kvcache" in refused.value.remedy
    assert model.config._attn_implementation in ("eager", "sdpa")


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_queries_and_keys_are_not_clipped(family_of, name):
    fused = [s.prev for s in family_of(name).subsets if s.reads == "heads" and s.rows is not None]
    assert all(any(part in linear for part in awq._UNCLIPPED) for linear in fused)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi3", "makes several tensors"),
        ("bloom", "makes several tensors"),
        ("phi", "one attention and one feed-forward part"),
        ("olmo2", "norms stand behind each branch"),
    ],
)
def test_blocks_that_cannot_be_reordered(family_of, name, reason):
    with pytest.raises(ModelError, match=reason):
        check_reorderable(family_of(name).subsets)


def test_a_bloom_that_does_not_call_its_linears():
    config = t.BloomConfig(**BLOOM, pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(ModelError, match="slow_but_exact") as refused:
        subsets_of(config)
    assert "slow_but_exact: false" in refused.value.remedy


def test_a_chatglm_without_a_last_norm():
    config = remote.ChatGLMConfig(post_layer_norm=False)
    adapter = find_adapter("auto", "chatglm")
    with pytest.raises(ModelError, match="no norm behind the last block"):
        residual_of(adapter, config, adapter.subsets(config, nn.Module()))


def skeleton_of(family, monkeypatch, **changes):
    """The skeleton of a checkpoint with a changed configuration, embedding loaded."""
    config = family.config
    for key, value in changes.items():
        setattr(config, key, value)
    monkeypatch.setattr(type(family), "config", property(lambda self: config))
    return family.loaded()


@torch.no_grad()
def test_a_hidden_state_that_begins_with_the_tokens(family_of, tokens, monkeypatch):
    skeleton = skeleton_of(family_of("chatglm"), monkeypatch, sequence_first=True)
    with pytest.raises(ModelError, match=r"of \[1, 12\] tokens is \[12, 1, 64\]"):
        recorded(skeleton, tokens(1, 12))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "falcon-7b", "chatglm"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_single_block_returns_what_the_model_expects(family_of, tokens, name, batch):
    """A tensor, a tuple, a pair to unpack: the head gets the last hidden state whole."""
    family = family_of(name)
    skeleton, ids = family.loaded(), tokens(batch, 12)
    model = skeleton.model
    blocks = model.get_submodule(family.adapter.blocks)
    for index in range(1, len(blocks)):
        del blocks[index]
    seen = recorded(skeleton, ids)
    assert len(seen.calls) == 1
    hidden = seen.calls[0](blocks[0], seen.hidden)
    logits = model(input_ids=ids, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(token_losses(skeleton, hidden, ids).flatten(), losses, rtol=1e-6, atol=1e-6)
