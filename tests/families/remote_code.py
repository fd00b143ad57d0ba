"""Small models whose code comes with the checkpoint, under the module names of InternLM2, MiniCPM, ChatGLM and Qwen.

This file is copied into their folders. Positions are rotary throughout; what isn't said otherwise is Llama's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rotary(tokens: int, dim: int) -> Tensor:
    """Angles ``[tokens, dim / 2]``."""
    return torch.arange(tokens)[:, None] * 10000.0 ** -(torch.arange(0, dim, 2) / dim)


def attend(query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:
    """Causal attention over ``[batch, tokens, heads, dim]``; each key-value head serves a run of query heads."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    repeats = query.shape[2] // key.shape[2]
    parts = (turned(query), turned(key).repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2))
    output = nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts), is_causal=True)
    return output.transpose(1, 2).flatten(2)


class Gated(nn.Module):
    """A gated feed-forward part whose Linears have the names that it is given."""

    def __init__(self, names: tuple[str, str, str], hidden: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.names = names
        for name, shape in zip(names, [(hidden, width), (hidden, width), (width, hidden)], strict=True):
            self.add_module(name, nn.Linear(*shape, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = map(self.get_submodule, self.names)
        return down(nn.functional.silu(gate(x)) * up(x))


class Remote(PreTrainedModel):
    """What all of them need of Transformers."""

    _no_split_modules = ()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.02)


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"

    def __init__(self, num_key_value_heads: int = 2, bias: bool = True, **rest) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = 208, 64, 128
        self.num_hidden_layers, self.num_attention_heads = 2, 4
        self.num_key_value_heads, self.bias = num_key_value_heads, bias
        super().__init__(**rest)


class InternLM2Attention(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.config, self.dim = config, config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.wqkv = nn.Linear(config.hidden_size, heads * self.dim, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        parts = self.wqkv(x).unflatten(-1, (self.config.num_key_value_heads, -1, self.dim))
        query, key, value = parts[..., :-2, :].flatten(2, 3), parts[..., -2, :], parts[..., -1, :]
        return self.wo(attend(query, key, value, angles))


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config)
        self.feed_forward = Gated(("w1", "w3", "w2"), config.hidden_size, config.intermediate_size)
        self.attention_norm, self.ffn_norm = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)

    def forward(self, hidden_states: Tensor, angles: Tensor) -> tuple[Tensor]:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), angles)
        return (hidden_states + self.feed_forward(self.ffn_norm(hidden_states)),)


class InternLM2Model(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.dim = config.hidden_size // config.num_attention_heads
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states, angles = self.tok_embeddings(input_ids), rotary(input_ids.shape[1], self.dim)
        for layer in self.layers:
            hidden_states = layer(hidden_states, angles=angles)[0]
        return self.norm(hidden_states)


class InternLM2ForCausalLM(Remote):
    config_class = InternLM2Config
    base_model_prefix = "model"

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool = False, **rest) -> CausalLMOutput:
        return CausalLMOutput(logits=self.output(self.model(input_ids)).float())


class MiniCPMConfig(PretrainedConfig):
    model_type = "minicpm"

    def __init__(self, tie_word_embeddings: bool = True, **rest) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = 208, 64, 128
        self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads = 2, 4, 2
        self.scale_emb, self.scale_depth, self.dim_model_base = 12, 1.4, 32
        super().__init__(tie_word_embeddings=tie_word_embeddings, **rest)


class MiniCPMAttention(nn.Module):
    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.dim)) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attend(query, key, value, angles))


class MiniCPMDecoderLayer(nn.Module):
    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        names = ("gate_proj", "up_proj", "down_proj")
        self.self_attn, self.mlp = MiniCPMAttention(config), Gated(names, config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.depth = config.scale_depth / config.num_hidden_layers**0.5

    def forward(self, hidden_states: Tensor, angles: Tensor) -> tuple[Tensor]:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), angles) * self.depth
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * self.depth,)


class MiniCPMModel(nn.Module):
    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.dim, self.scale = config.hidden_size // config.num_attention_heads, config.scale_emb
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniCPMDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = self.embed_tokens(input_ids) * self.scale
        for layer in self.layers:
            hidden_states = layer(hidden_states, angles=rotary(input_ids.shape[1], self.dim))[0]
        return self.norm(hidden_states)


class MiniCPMForCausalLM(Remote):
    config_class = MiniCPMConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        self.model = MiniCPMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool = False, **rest) -> CausalLMOutput:
        hidden_states = self.model(input_ids) / (self.config.hidden_size / self.config.dim_model_base)
        return CausalLMOutput(logits=self.lm_head(hidden_states).float())


class ChatGLMConfig(PretrainedConfig):
    model_type = "chatglm"

    def __init__(
        self,
        rmsnorm: bool = True,
        multi_query_attention: bool = True,
        add_bias_linear: bool = False,
        apply_residual_connection_post_layernorm: bool = False,
        post_layer_norm: bool = True,
        sequence_first: bool = False,
        **rest,
    ) -> None:
        self.padded_vocab_size = self.vocab_size = 208
        self.hidden_size, self.ffn_hidden_size, self.num_layers = 64, 128, 2
        self.num_attention_heads, self.kv_channels, self.multi_query_group_num = 4, 16, 2
        self.rmsnorm, self.multi_query_attention, self.add_bias_linear = rmsnorm, multi_query_attention, add_bias_linear
        self.apply_residual_connection_post_layernorm = apply_residual_connection_post_layernorm
        self.post_layer_norm, self.sequence_first = post_layer_norm, sequence_first
        super().__init__(**rest)


class ChatGLMAttention(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        heads, groups = config.num_attention_heads, config.multi_query_group_num
        rows = heads + 2 * groups if config.multi_query_attention else 3 * heads
        self.query_key_value = nn.Linear(config.hidden_size, rows * config.kv_channels, bias=True)
        self.dense = nn.Linear(heads * config.kv_channels, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        config, parts = self.config, self.query_key_value(x).unflatten(-1, (-1, self.config.kv_channels))
        if config.multi_query_attention:
            groups = config.multi_query_group_num
            query, key, value = parts.split([config.num_attention_heads, groups, groups], dim=2)
        else:
            query, key, value = parts.unflatten(2, (-1, 3)).unbind(3)
        return self.dense(attend(query, key, value, angles))


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        norm = RMSNorm if config.rmsnorm else nn.LayerNorm
        self.carried = config.apply_residual_connection_post_layernorm
        self.input_layernorm, self.self_attention = norm(config.hidden_size), ChatGLMAttention(config)
        self.post_attention_layernorm, self.mlp = norm(config.hidden_size), ChatGLMMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor,
        kv_cache=None,
        use_cache=True,
    ) -> tuple[Tensor, None]:
        normed = self.input_layernorm(hidden_states)
        residual = normed if self.carried else hidden_states
        hidden_states = residual + self.self_attention(normed, rotary_pos_emb)
        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.carried else hidden_states
        return residual + self.mlp(normed), None


class GLMTransformer(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config) for _ in range(config.num_layers))
        if config.post_layer_norm:
            self.final_layernorm = (RMSNorm if config.rmsnorm else nn.LayerNorm)(config.hidden_size)

    def forward(self, hidden_states: Tensor, angles: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, None, angles, kv_cache=None, use_cache=False)
        return self.final_layernorm(hidden_states) if hasattr(self, "final_layernorm") else hidden_states


class ChatGLMEmbedding(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class ChatGLMModel(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config, self.embedding, self.encoder = config, ChatGLMEmbedding(config), GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = self.embedding(input_ids)
        if self.config.sequence_first:
            hidden_states = hidden_states.transpose(0, 1)
        return self.encoder(hidden_states, rotary(input_ids.shape[1], self.config.kv_channels))


class ChatGLMForConditionalGeneration(Remote):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool = False, **rest) -> CausalLMOutput:
        return CausalLMOutput(logits=self.transformer.output_layer(self.transformer(input_ids)).float())


class QWenConfig(PretrainedConfig):
    model_type = "qwen"

    def __init__(self, no_bias: bool = True, tie_word_embeddings: bool = False, **rest) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = 208, 64, 256
        self.num_hidden_layers, self.num_attention_heads, self.kv_channels, self.no_bias = 2, 4, 16, no_bias
        super().__init__(tie_word_embeddings=tie_word_embeddings, **rest)


class QWenAttention(nn.Module):
    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.dim = config.kv_channels
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (-1, self.dim)) for part in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(attend(query, key, value, angles))


class QWenMLP(nn.Module):
    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size // 2, not config.no_bias
        self.w1, self.w2 = nn.Linear(hidden, width, bias=bias), nn.Linear(hidden, width, bias=bias)
        self.c_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        product = self.w1(x) * nn.functional.silu(self.w2(x))
        return self.c_proj(product)


class QWenBlock(nn.Module):
    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = RMSNorm(config.hidden_size), QWenAttention(config)
        self.ln_2, self.mlp = RMSNorm(config.hidden_size), QWenMLP(config)

    def forward(self, hidden_states: Tensor, layer_past=None, rotary_pos_emb=None, head_mask=None) -> tuple[Tensor]:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), rotary_pos_emb)
        return (hidden_states + self.mlp(self.ln_2(hidden_states)),)


class QWenModel(nn.Module):
    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.dim = config.kv_channels
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QWenBlock(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states, angles = self.wte(input_ids), rotary(input_ids.shape[1], self.dim)
        for block, layer_past in zip(self.h, [None] * len(self.h), strict=True):
            hidden_states = block(hidden_states, layer_past=layer_past, rotary_pos_emb=angles, head_mask=None)[0]
        return self.ln_f(hidden_states)


class QWenLMHeadModel(Remote):
    config_class = QWenConfig
    base_model_prefix = "transformer"

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool = False, **rest) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.transformer(input_ids)).float())


MODELS = (InternLM2ForCausalLM, MiniCPMForCausalLM, ChatGLMForConditionalGeneration, QWenLMHeadModel)
