"""A KV cache that can't be had is refused before a weight is read, with one message that names the key."""

from __future__ import annotations

import pytest
from refusals import contains
from test_kv_cache import FP8, KIVI, NAIVE
from transformers import LlamaForCausalLM


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ({**NAIVE, "bit": 9}, ["quant.kvcache.bit", "2 to 8 bits"]),
        ({**NAIVE, "bit": "e3m2", "symmetric": True}, ["quant.kvcache.bit", "e3m2", "e4m3"]),
        ({**NAIVE, "bit": "e4m3"}, ["quant.kvcache.symmetric", "set it to True"]),
        ({**NAIVE, "granularity": "per_head", "head_num": 2}, ["quant.kvcache.granularity", "per_token"]),
        ({**NAIVE, "granularity": "per_group", "group_size": 12}, ["group_size: 12", "16 channels of a head", "8, 16"]),
        ({**NAIVE, "residual_length": 64}, ["quant.kvcache.residual_length", "no use with method Naive"]),
        ({**NAIVE, "special": {"window_length": 4}}, ["quant.kvcache.special", "not available"]),
        ({**NAIVE, "int_range": [0, 2]}, ["quant.kvcache.int_range", "not available"]),
        ({**NAIVE, "metod": "Naive"}, ["quant.kvcache.metod", "did you mean 'method'"]),
        ({**KIVI, "residual_length": 12}, ["quant.kvcache.residual_length", "12 isn't a multiple of group_size 8"]),
        (
            {**KIVI, "granularity": "per_tensor", "group_size": -1},
            ["quant.kvcache.granularity", "per_group or per_token"],
        ),
        ({**KIVI, "static": True}, ["quant.kvcache", "per_tensor"]),
        ({**KIVI, "group_size": 32, "residual_length": 32}, ["group_size: 32", "16 channels of a head"]),
        ({**FP8, "calib_algo": "static_hist"}, ["quant.kvcache.calib_algo", "static_hist", "not available"]),
        (KIVI, ["save_vllm", "no KV cache", "e4m3", "save_fake"]),
        ({**FP8, "bit": "e5m2"}, ["save_vllm", "e4m3"]),
        ({**FP8, "static": False}, ["save_vllm", "static: True"]),
    ],
    ids=str,
)
def test_a_cache_that_cannot_be_had(case, refused, cache, said):
    contains(refused(case(quant={"kvcache": cache})), *said)


def test_static_ranges_without_calibration_text(case, refused):
    contains(refused(case(quant={"kvcache": FP8}), "calib=null"), "quant.kvcache.static", "'calib'", "static: False")


@pytest.mark.parametrize("method", ["GPTQ", "Awq"])
def test_a_method_that_has_no_weights_to_quantize(case, refused, method):
    run = case(method=method, quant={"kvcache": FP8, "weight": None})
    contains(refused(run), "quant.weight is missing", "quant.method to RTN", method)


def test_nothing_is_quantized_at_all(case, refused):
    contains(refused(case(quant={"weight": None})), "quant.weight is missing")


@pytest.mark.parametrize(
    "changes", [{"quant": {"kvcache": FP8}}, {"eval": {"type": "decode_ppl"}}], ids=["kv", "decode"]
)
def test_a_model_whose_attention_is_its_own(case, refused, monkeypatch, changes):
    monkeypatch.setattr(LlamaForCausalLM, "_can_set_attn_implementation", classmethod(lambda kind: False))
    contains(refused(case(**changes)), "attention interface", "quant.kvcache", "decode_ppl")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("eval.num_eval_tokens=25", ["num_eval_tokens", "25 is more than the 24 tokens"]),
        ("eval.num_eval_tokens=1", ["num_eval_tokens", "2"]),
        ("eval.seq_len=null", ["seq_len", "or num_eval_tokens"]),
        ("eval.num_samples=0", ["num_samples"]),
    ],
)
def test_limits_of_decoding(case, refused, override, said):
    contains(refused(case(eval={"type": "decode_ppl"}), override), *said)
