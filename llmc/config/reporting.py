"""What is told of a run besides its perplexities."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmc.config import forms
from llmc.config.section import Section


class ReportConfig(Section):
    """What is written about the run, and what is looked at for it."""

    html: bool = Field(True, description="Write report.html beside metrics.json.")
    analysis: bool = Field(True, description="Look at each layer: errors, kurtosis, outlier channels, clipping.")
    tokens: int | None = Field(
        None,
        ge=2,
        description="Tokens of the calibration text, or else of the evaluation's, for it; None: 1 of 16, 512 to 2048.",
    )
    surfaces: Literal["auto"] | forms.BlockIds = Field(
        "auto",
        description="Numbers of the blocks whose inputs surfaces.safetensors shows, or ranges such as 0-3; auto: the "
        "first, the middle and the last.",
    )
