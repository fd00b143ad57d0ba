"""Text (and images) for calibration and evaluation: where it comes from, how it is sampled and cut into windows."""

from __future__ import annotations

from llmc.data.evaluation import EvaluationSpec, EvaluationWindows, evaluation_windows
from llmc.data.images import ImageTextSpec, ProcessedSample, image_text_samples
from llmc.data.sampling import PRESETS, CalibrationSpec, calibration_samples
from llmc.data.tokens import Tokenizer

__all__ = [
    "PRESETS",
    "CalibrationSpec",
    "EvaluationSpec",
    "EvaluationWindows",
    "ImageTextSpec",
    "ProcessedSample",
    "Tokenizer",
    "calibration_samples",
    "evaluation_windows",
    "image_text_samples",
]
