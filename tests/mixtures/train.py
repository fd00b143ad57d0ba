"""Makes tiny mixtures that have learned some English, so that their perplexity means something.

    python tests/mixtures/train.py [folder]

Their tokens are bytes. They are trained on WikiText-2's validation text, about a minute each on one core; the test text
is left to the evaluation. What comes out is kept in a folder whose name is a hash of this file, in ``$LLMC_CACHE`` or
``~/.cache/llmc``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from real import text

STEPS, BATCH, LENGTH = 400, 16, 64
SHAPE = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 2}
SHAPE |= {"tie_word_embeddings": False, "router_aux_loss_coef": 0.02, "output_router_logits": False}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=8, intermediate_size=96),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SHAPE, num_experts=16, moe_intermediate_size=64, head_dim=16, norm_topk_prob=True
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def train(config: PretrainedConfig, tokens: Tensor) -> torch.nn.Module:
    """Next-token prediction on random windows, with Adam and a cosine of the learning rate."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def trained(family: str, root: Path | None = None) -> Path:
    """The folder of a trained model, made if it isn't there; it appears whole or not at all."""
    root = root or Path(os.environ.get("LLMC_CACHE") or "~/.cache/llmc").expanduser()
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = root / "tests" / f"tiny-{family}-{digest}"
    if folder.is_dir():
        return folder
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    corpus = Path(text("valid")).read_text(encoding="utf-8")
    tokenizer = make_tokenizer()
    tokens = torch.tensor(tokenizer(corpus, add_special_tokens=False)["input_ids"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = train(CONFIGS[family](), tokens)
    torch.set_num_threads(threads)
    model.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    if folder.is_dir():  # another process was quicker
        shutil.rmtree(part)
    else:
        part.rename(folder)
    return folder


if __name__ == "__main__":
    for name in CONFIGS:
        print(trained(name, Path(sys.argv[1]) if len(sys.argv) > 1 else None))
