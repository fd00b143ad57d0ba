"""How many tokens a run looks at."""

from __future__ import annotations

import pytest
import torch

from llmc.analyzing import first_tokens, sample_size
from llmc.config.reporting import ReportConfig
from llmc.stream.batch import Batch


@pytest.mark.parametrize(
    ("batches", "rows", "length", "size"),
    [
        pytest.param(4, 1, 32, 512, id="a small text is looked at whole"),
        pytest.param(16, 1, 512, 512, id="a sixteenth"),
        pytest.param(8, 4, 512, 1024, id="rows of all batches count"),
        pytest.param(64, 1, 512, 2048, id="no more than 2048"),
        pytest.param(256, 1, 512, 2048, id="however long the text"),
    ],
)
def test_a_sixteenth_of_the_text_within_bounds(batches, rows, length, size):
    text = [Batch(torch.zeros(rows, length, dtype=torch.long)) for _ in range(batches)]
    assert sample_size(ReportConfig(), text) == size
    looked_at = sum(batch.tokens.numel() for batch in first_tokens(text, size))
    assert looked_at == min(size, batches * rows * length)


@pytest.mark.parametrize("tokens", [2, 40, 10**6])
def test_what_the_file_says_counts(tokens):
    text = [Batch(torch.zeros(1, 512, dtype=torch.long))] * 16
    assert sample_size(ReportConfig(tokens=tokens), text) == tokens
