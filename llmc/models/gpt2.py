"""GPT-2: LayerNorm, biases, GELU, learned positions; queries, keys and values from one Linear."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from .adapter import ModelAdapter, Residual, Subset


def subsets(config: PretrainedConfig, block: nn.Module) -> tuple[Subset, ...]:
    """The last third of c_attn's rows makes the values. GELU stands between c_fc and mlp.c_proj, so that nothing can
    absorb a scale of what the latter reads."""
    width = config.hidden_size
    values = ((2 * width, 3 * width),)
    return (
        Subset(("attn.c_attn",), "ln_1", "attn", writes="heads"),
        Subset(("attn.c_proj",), "attn.c_attn", "attn.c_proj", reads="heads", writes="residual", rows=values),
        Subset(("mlp.c_fc",), "ln_2", "mlp.c_fc", writes="ffn"),
        Subset(("mlp.c_proj",), None, "mlp.c_proj", reads="ffn", writes="residual"),
    )


def residual(config: PretrainedConfig) -> Residual:
    """Token and position embeddings enter it, the head reads it through the last norm."""
    return Residual(("transformer.wte", "transformer.wpe"), "transformer.ln_f", ("lm_head",), keeps_mean=True)


GPT2 = ModelAdapter(
    name="GPT2",
    model_types=("gpt2",),
    blocks="transformer.h",
    head=("transformer.ln_f", "lm_head"),
    subsets=subsets,
    residual=residual,
)
