"""Greedy continuations of prompts: by a whole model with a cache, or by a streamed one, which reads all of its weights
for each token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .scoring import LENGTH_STEP, Logits, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = tuple[int, ...]


def greedy_streamed(
    prompts: Sequence[Tokens],
    logits: Logits,
    count: int,
    ends: Collection[int],
    limit: int,
    *,
    batch_size: int,
    alone: bool = False,
) -> list[Tokens]:
    """Continue prompts by the most likely token, again and again; each step is one pass over the model.

    Args:
        prompts: token ids, at least one each.
        logits: the model.
        count: the most new tokens.
        ends: tokens that end a text; such a token is the last of its continuation.
        limit: how many tokens the model can read.
        batch_size: prompts in a batch.
        alone: every prompt by itself and unpadded, for models whose outputs depend on the rest of the batch.

    Returns:
        The new tokens of each prompt.
    """
    made: list[list[int]] = [[] for _ in prompts]
    size, step = (1, 1) if alone else (batch_size, LENGTH_STEP)
    for _ in range(count):
        going = [index for index, new in enumerate(made) if not new or new[-1] not in ends]
        parts = [going[start : start + size] for start in range(0, len(going), size)]
        rows = [[(*prompts[index], *made[index]) for index in part] for part in parts]
        for index, token in _next_tokens(rows, parts, logits, limit, step).items():
            made[index].append(token)
    return [tuple(new) for new in made]


def _next_tokens(
    rows: Sequence[Sequence[Tokens]], parts: Sequence[Sequence[int]], logits: Logits, limit: int, step: int
) -> dict[int, int]:
    """The most likely token behind each text, by the number of its prompt."""
    found: dict[int, int] = {}

    def visit(batch: int, start: int, chunk: Tensor) -> None:
        for index, text, row in zip(parts[batch], rows[batch], chunk, strict=True):
            place = len(text) - 1 - start
            if 0 <= place < len(row):
                found[index] = int(row[place].float().argmax())

    if rows:
        logits([padded(batch, limit, step) for batch in rows], visit)
    return found


def greedy_whole(prompts: Sequence[Tokens], model: PreTrainedModel, count: int, ends: Collection[int]) -> list[Tokens]:
    """The same by a whole model's own ``generate``, prompt by prompt, whatever its generation settings say."""
    from transformers import GenerationConfig

    own = model.generation_config
    # What a call leaves open is filled in from the model's settings, such as a penalty on repetitions: there are none.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=count, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
    )
    made = []
    try:
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            with torch.no_grad():
                whole = model.generate(ids, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
            made.append(tuple(whole[0, len(prompt) :].tolist()))
    finally:
        model.generation_config = own
    return made
