"""Text for calibration and evaluation: where it comes from, how it is sampled, how it is cut into windows."""

from __future__ import annotations

from llmc.data.evaluation import EvaluationSpec, EvaluationWindows, evaluation_windows
from llmc.data.sampling import PRESETS, CalibrationSpec, calibration_samples
from llmc.data.tokens import Tokenizer

__all__ = [
    "PRESETS",
    "CalibrationSpec",
    "EvaluationSpec",
    "EvaluationWindows",
    "Tokenizer",
    "calibration_samples",
    "evaluation_windows",
]
