"""Small tasks of one's own for lm-eval, and whole models to answer them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmc.eval.scoring import Logits, Visit

OWN = Path(__file__).parent / "tasks" / "own"


def write_own_tasks(folder: Path) -> Path:
    """The tasks in ``tests/tasks/own``, copied to where their data is."""
    shutil.copytree(OWN, folder)
    for file in folder.glob("*.yaml"):
        file.write_text(file.read_text().replace("{folder}", str(folder)))
    return folder


def whole_logits(model: PreTrainedModel, chunk: int = 10**6) -> Logits:
    """A whole model, whose logits are shown some tokens at a time."""

    def run(batches: Sequence[Tensor], visit: Visit) -> None:
        for index, batch in enumerate(batches):
            with torch.no_grad():
                logits = model(input_ids=batch).logits
            for start in range(0, batch.shape[1], chunk):
                visit(index, start, logits[:, start : start + chunk])

    return run
