"""Random windows of random documents: the c4 convention, for calibration and for the older evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from torch import Tensor


def document_windows(
    documents: Sequence[str], encode: Callable[[str], Tensor], count: int, seq_len: int, seed: int
) -> tuple[list[Tensor], int]:
    """Draw documents until one is longer than a window, take a random window of it, and so on.

    Args:
        documents: at least one.
        encode: text -> token ids, ``[n]``.
        count: how many windows.
        seq_len: tokens in a window.
        seed: of the only generator used; the draws are those of the public code with this seed.

    Returns:
        `count` windows, each ``[seq_len]``; or none where no document is longer than a window. And the length of the
        longest document that was too short.
    """
    generator = random.Random(seed)
    too_short: dict[int, int] = {}
    windows: list[Tensor] = []
    while len(windows) < count and len(too_short) < len(documents):
        index = generator.randint(0, len(documents) - 1)
        if index in too_short:
            continue
        tokens = encode(documents[index])
        if len(tokens) > seq_len:
            start = generator.randint(0, len(tokens) - seq_len - 1)
            windows.append(tokens[start : start + seq_len].clone())
        else:
            too_short[index] = len(tokens)
    return windows, max(too_short.values(), default=0)
