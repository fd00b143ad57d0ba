"""What a run looks at besides what its method needs: which tokens, which blocks, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .algorithms import Recipe
from .analysis import OUTLIER_RATIO
from .config.reporting import ReportConfig
from .errors import ConfigError
from .models import BlockSelection
from .samples import Evaluation
from .stream.analysis import AnalysisPlan
from .stream.batch import Batch
from .stream.surfaces import gather_surfaces
from .workspace import SURFACES

if TYPE_CHECKING:
    from .prepare import Prepared

_TOGETHER = 2048  # tokens in a batch
_SHARE, _FEWEST, _MOST = 16, 512, 2048


@dataclass(frozen=True)
class Sample:
    """The tokens that the analysis looks at.

    Attributes:
        text: where they are from; None: there are none.
        batches: the first tokens of that text, whatever batches it is read in otherwise.
    """

    text: Literal["calibration", "evaluation"] | None = None
    batches: list[Batch] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many they are."""
        return sum(batch.tokens.numel() for batch in self.batches)


def analysis_sample(
    report: ReportConfig, recipe: Recipe, calib: Sequence[Batch], evaluations: Sequence[Evaluation]
) -> Sample:
    """The first tokens of the calibration text, or else of the first evaluation's; none where nobody looks."""
    if not report.analysis or not recipe.steps:
        return Sample()
    text = calib or [Batch(one.windows.tokens) for one in evaluations[:1]]
    if not text:
        return Sample()
    return Sample("calibration" if calib else "evaluation", first_tokens(text, sample_size(report, text)))


def sample_size(report: ReportConfig, text: Sequence[Batch]) -> int:
    """How many tokens of a text are looked at. They pass a block three times and each Linear twice more, so from 8192
    tokens on this is few beside what a calibration sends through it."""
    if report.tokens is not None:
        return report.tokens
    return min(max(sum(batch.tokens.numel() for batch in text) // _SHARE, _FEWEST), _MOST)


def first_tokens(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first so many tokens, sample by sample, the last one cut; one with images is whole or not there, but for the
    first. Samples of one length go together."""
    found: list[Batch] = []
    rows: list[Tensor] = []
    for one in _cut(batches, count):
        full = (len(rows) + 1) * one.tokens.shape[1] > _TOGETHER
        if rows and (one.has_images or full or rows[0].shape != one.tokens.shape):
            found.append(Batch(torch.cat(rows)))
            rows = []
        if one.has_images:
            found.append(one)
        else:
            rows.append(one.tokens)
    return [*found, *([Batch(torch.cat(rows))] if rows else [])]


def _cut(batches: Sequence[Batch], count: int) -> Iterator[Batch]:
    left = count
    for batch in batches:
        for one in [batch] if batch.has_images else [Batch(row[None]) for row in batch.tokens]:
            length = one.tokens.numel()
            if left < 2 or (one.has_images and left < min(length, count)):
                return  # a model needn't have a way with a single token
            yield one if length <= left or one.has_images else Batch(one.tokens[:, :left])
            left -= length


def check_surfaces(report: ReportConfig, blocks: int) -> None:
    """Refuse blocks that the model hasn't got.

    Raises:
        ConfigError: names one.
    """
    if report.surfaces != "auto" and max(report.surfaces, default=0) >= blocks:
        raise ConfigError(
            f"report.surfaces: {max(report.surfaces)}, but the model's blocks are 0 to {blocks - 1}",
            "name others, or auto",
        )


def analysis_plan(prepared: Prepared, selection: BlockSelection, state: Path | None) -> AnalysisPlan | None:
    """What the engine is to look at; None: nothing.

    Args:
        prepared: the run.
        selection: the blocks that stay.
        state: where surfaces are kept until the end; None where the run leaves nothing.
    """
    report = prepared.config.report
    if not report.analysis or not prepared.recipe.steps:
        return None
    kept = list(selection.kept)
    auto = {kept[0], kept[len(kept) // 2], kept[-1]}
    chosen = auto if report.surfaces == "auto" else set(report.surfaces)
    return AnalysisPlan(prepared.sample.batches, frozenset(chosen), state)


def finish_analysis(prepared: Prepared, state: Path, save_path: Path) -> dict[str, Any] | None:
    """Write the surfaces, if any were kept, and say what was looked at, for ``metrics.json``."""
    if not prepared.config.report.analysis or not prepared.recipe.steps:
        return None
    sample = prepared.sample
    columns = {layer.name: layer.columns for layer in prepared.layers}
    written = gather_surfaces(state, save_path / SURFACES, sample.tokens, columns)
    return {
        "text": sample.text,
        "tokens": sample.tokens,
        "outlier_ratio": OUTLIER_RATIO,
        "surfaces": SURFACES if written else None,
    }
