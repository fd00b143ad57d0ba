"""Rules across the keys of a section, where they are many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.config import legacy
from llmc.config.suggest import did_you_mean, refuse_if

if TYPE_CHECKING:
    from llmc.config.schema import EvalConfig
    from llmc.config.tensors import KvCacheConfig

_FLOATS = ("e4m3", "e5m2")


def check_cache(cache: KvCacheConfig) -> KvCacheConfig:
    """Grid, granularity and residual of a quantized KV cache go together."""
    if cache.bit == 16:  # off
        return cache
    bit, floating = cache.bit, isinstance(cache.bit, str)
    known = bit in _FLOATS if isinstance(bit, str) else bit <= 8
    refuse_if(not known, "bit", f"{bit}: a KV cache has 2 to 8 bits, or e4m3 or e5m2")
    refuse_if(floating and not cache.symmetric, "symmetric", f"must be True with {bit}: floats have no zero point")
    refuse_if(cache.granularity == "per_head", "granularity", "per_head: use per_token, which has scales for each head")
    if cache.method == "Naive":
        idle = cache.residual_length != type(cache).model_fields["residual_length"].default
        refuse_if(idle, "residual_length", "has no use with method Naive; leave it out, or use method Kivi")
        return cache
    refuse_if(cache.granularity == "per_tensor", "granularity", "per_tensor: Kivi needs per_group or per_token")
    residual, group = cache.residual_length, cache.group_size or 1
    text = f"{residual} isn't a multiple of group_size {group}: Kivi quantizes whole groups of tokens"
    refuse_if(residual % group, "residual_length", text)
    return cache


def check_evaluation(one: EvalConfig) -> EvalConfig:
    """An evaluation of text knows its text, and how many tokens of it go together."""
    reads_text = one.type in ("ppl", "token_acc", "decode_ppl")
    wanted = f"is not one of {', '.join(legacy.TEXT_EVALS)}{did_you_mean(one.name, legacy.TEXT_EVALS)}"
    refuse_if(reads_text and one.name not in legacy.TEXT_EVALS, "name", f"{one.name!r} {wanted}")
    refuse_if(one.name == "text" and not one.path, "path", "missing; name 'text' reads a local file or folder")
    blind, tokens = one.eval_pos and not one.seq_len, one.num_eval_tokens
    refuse_if(one.type == "ppl" and blind, "seq_len", "missing; perplexity needs the number of tokens in a window")
    compares = one.type == "token_acc"
    refuse_if(compares and blind, "seq_len", "missing; token_acc needs the number of tokens in a window")
    alone = compares and set(one.eval_pos) == {"pretrain"}
    refuse_if(alone, "eval_pos", "only pretrain: token_acc compares with it; add fake_quant, transformed or both")
    decodes = one.type == "decode_ppl"
    refuse_if(decodes and blind and not tokens, "seq_len", "missing; decode_ppl needs it, or num_eval_tokens")
    more = decodes and one.seq_len and tokens and tokens > one.seq_len
    refuse_if(more, "num_eval_tokens", f"{tokens} is more than the {one.seq_len} tokens of a window (seq_len)")
    return one
