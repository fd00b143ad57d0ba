"""A tiny configuration of every family, several where its blocks are built in several ways.

To test one more, add a line to ``CONFIGS``; and one to ``NOT_ROTATED`` or ``OWN_ATTENTION`` if it has its reason to be
there.
"""

from __future__ import annotations

import remote_code as remote
import transformers as t
from transformers import PreTrainedConfig

SHAPE = {"vocab_size": 208, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MHA = {**SHAPE, "intermediate_size": 128, "max_position_embeddings": 64}
GQA = {**MHA, "num_key_value_heads": 2}
OPT = {**SHAPE, "ffn_dim": 128, "max_position_embeddings": 64, "word_embed_proj_dim": 64, "dropout": 0.0}
FALCON = {**SHAPE, "ffn_hidden_size": 128}
BIGCODE = {**SHAPE, "n_inner": 128, "max_position_embeddings": 64}
BLOOM = {"vocab_size": 208, "hidden_size": 64, "n_layer": 2, "n_head": 4}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**GQA, "head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING}
GLM = {**GQA, "head_dim": 16, "pad_token_id": 0}
SCALARS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 8.0,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": t.LlamaConfig(**GQA, tie_word_embeddings=False),
    "llama-tied": t.LlamaConfig(**GQA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-mha": t.LlamaConfig(**MHA),
    "llama4": t.Llama4TextConfig(
        **GQA, intermediate_size_mlp=128, head_dim=16, moe_layers=[], no_rope_layers=[1, 0], attention_chunk_size=8
    ),
    "mistral": t.MistralConfig(**GQA, sliding_window=8),
    "qwen2": t.Qwen2Config(**GQA),
    "qwen3": t.Qwen3Config(**GQA, head_dim=32),
    "smollm3": t.SmolLM3Config(**GQA, no_rope_layers=[1, 0], pad_token_id=0),
    "granite": t.GraniteConfig(**GQA, **SCALARS),
    "gemma": t.GemmaConfig(**GQA, head_dim=32),
    "gemma2": t.Gemma2Config(**GEMMA),
    "gemma3": t.Gemma3TextConfig(**GEMMA),
    "phi": t.PhiConfig(**MHA),
    "phi-qk-norm": t.PhiConfig(**GQA, qk_layernorm=True, tie_word_embeddings=True),
    "phi3": t.Phi3Config(**GQA, pad_token_id=0, sliding_window=8),
    "glm": t.GlmConfig(**GLM, attention_bias=True),
    "glm4": t.Glm4Config(**GLM),
    "olmo2": t.Olmo2Config(**GQA, pad_token_id=0),
    "olmo3": t.Olmo3Config(**GQA, pad_token_id=0, **SLIDING),
    "stablelm": t.StableLmConfig(**GQA),
    "stablelm-parallel": t.StableLmConfig(**GQA, use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True),
    "opt": t.OPTConfig(**OPT),
    "opt-post-norm": t.OPTConfig(**OPT, do_layer_norm_before=False),
    "bloom": t.BloomConfig(**BLOOM),
    "bloom-carried": t.BloomConfig(**BLOOM, apply_residual_connection_post_layernorm=True),
    "falcon-7b": t.FalconConfig(**FALCON),
    "falcon-11b": t.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    "falcon-40b": t.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": t.FalconConfig(**FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "gpt-neox": t.GPTNeoXConfig(**MHA),
    "gpt-neox-sequential": t.GPTNeoXConfig(**MHA, use_parallel_residual=False, attention_bias=False),
    "bigcode": t.GPTBigCodeConfig(**BIGCODE, multi_query=True),
    "bigcode-mha": t.GPTBigCodeConfig(**BIGCODE, multi_query=False),
    "starcoder2": t.Starcoder2Config(**GQA, sliding_window=8),
    "internlm2": remote.InternLM2Config(),
    "minicpm": remote.MiniCPMConfig(),
    "chatglm": remote.ChatGLMConfig(),
    "chatglm-layernorm": remote.ChatGLMConfig(rmsnorm=False, multi_query_attention=False, add_bias_linear=True),
    "chatglm-carried": remote.ChatGLMConfig(apply_residual_connection_post_layernorm=True),
    "qwen": remote.QWenConfig(),
}

REMOTE = {model.config_class: model for model in remote.MODELS}
"""The model class of each configuration whose code comes with the checkpoint."""

NOT_ROTATED = {
    "gemma2": "norm stands behind each branch",
    "gemma3": "norm stands behind each branch",
    "glm4": "norm stands behind each branch",
    "olmo2": "norm stands behind each branch",
    "olmo3": "norm stands behind each branch",
    "opt-post-norm": "norms stand behind each addition",
    "bloom": "norm stands between the embedding and the residual",
    "bloom-carried": "norm stands between the embedding and the residual",
    "chatglm-carried": "goes on behind the norms",
}
"""What can't be rotated, with a part of the reason that is given."""

OWN_ATTENTION = (
    *("bloom", "bloom-carried", "falcon-7b", "falcon-11b", "falcon-40b", "falcon-rw", "gemma2"),
    *("internlm2", "minicpm", "chatglm", "chatglm-layernorm", "chatglm-carried", "qwen"),
)
"""Whose attention isn't Transformers' exchangeable SDPA."""
