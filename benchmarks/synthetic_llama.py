"""Writes a Llama of random weights and any number of equal blocks, for measuring memory.

    python benchmarks/synthetic_llama.py FOLDER --blocks 8

The weights are bfloat16, drawn with a standard deviation of 0.02, so that activations stay finite through any number of
blocks. Every block is a safetensors shard of its own, written before the next one is drawn: writing takes the memory of
one block. The same seed gives the same block i, however many blocks there are. The tokenizer knows bytes only, so any
text can be tokenized.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

STD = 0.02
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Sizes:
    """Shape of a Llama. By default a block has 29.4 million weights: 59 MB in bfloat16."""

    hidden: int = 2048
    intermediate: int = 2048
    heads: int = 16
    kv_heads: int = 16
    vocab: int = 512

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"heads must divide hidden, and kv_heads must divide heads: {self}")
        if self.vocab < len(SPECIAL_TOKENS) + 256:
            raise ValueError(f"vocab must be {len(SPECIAL_TOKENS) + 256} or more: a token for every byte")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a block, by its name in the block."""
        kv = self.kv_heads * self.head_dim
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }


def write_synthetic_llama(folder: Path, blocks: int, sizes: Sizes | None = None, seed: int = 0) -> None:
    """Write a checkpoint with ``blocks`` blocks that transformers loads; the folder is made if need be."""
    sizes = sizes or Sizes()
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, blocks, sizes)
    _write_tokenizer(folder, sizes.vocab)
    _write_shards(folder, blocks, sizes, seed)


def _units(blocks: int, sizes: Sizes) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of the tensors of each shard: the embedding, every block, the head."""
    yield {"model.embed_tokens.weight": (sizes.vocab, sizes.hidden)}
    for block in range(blocks):
        yield {f"model.layers.{block}.{name}": shape for name, shape in sizes.block_shapes().items()}
    yield {"model.norm.weight": (sizes.hidden,), "lm_head.weight": (sizes.vocab, sizes.hidden)}


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A random matrix, or the ones of a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, STD, generator=generator)


def _write_shards(folder: Path, blocks: int, sizes: Sizes, seed: int) -> None:
    count = blocks + 2
    weight_map: dict[str, str] = {}
    total = 0
    for index, shapes in enumerate(_units(blocks, sizes)):
        # The head has a place of its own among the seeds, lest it change block i of a longer model.
        place = index if index <= blocks else 2**31 - 1
        generator = torch.Generator().manual_seed((seed << 32) + place)
        tensors = {name: _draw(shape, generator) for name, shape in shapes.items()}
        shard = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_config(folder: Path, blocks: int, sizes: Sizes) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "unk_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": STD,
        "torch_dtype": "bfloat16",
    }
    _write_json(folder / "config.json", config)


def _write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level tokenizer without merges; names that no text yields fill the vocabulary up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    known = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = known + [f"<unused{i}>" for i in range(vocab - len(known))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    unk, bos, eos = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": 2048,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    sizes = Sizes()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=sizes.hidden)
    parser.add_argument("--intermediate", type=int, default=sizes.intermediate)
    parser.add_argument("--heads", type=int, default=sizes.heads)
    parser.add_argument("--kv-heads", type=int, default=sizes.kv_heads)
    parser.add_argument("--vocab", type=int, default=sizes.vocab)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = Sizes(args.hidden, args.intermediate, args.heads, args.kv_heads, args.vocab)
    write_synthetic_llama(args.folder, args.blocks, sizes, args.seed)


if __name__ == "__main__":
    main()
