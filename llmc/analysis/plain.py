"""Numbers as a report has them."""

from __future__ import annotations

import math

_DIGITS = 6


def plain(value: float) -> float | None:
    """Six significant digits; None for what JSON has no number for (a share of nothing, an error of 0 in decibels)."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
