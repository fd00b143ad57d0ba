"""The errors that llmc raises on purpose: each says what is wrong, where, and what to do."""

from __future__ import annotations


class LlmcError(Exception):
    """Base of every error that is the user's to mend. The command line prints it and exits with 2.

    Args:
        message: what is wrong and where (key, file, layer).
        remedy: what to do about it, one sentence.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.remedy}" if self.remedy else self.message


class ConfigError(LlmcError):
    """The YAML file, or what follows from it, can't be run as it stands."""


class CheckpointError(LlmcError):
    """The model's files are missing, incomplete or hold something unusable."""


class DataError(LlmcError):
    """The calibration or evaluation text is missing, too short or malformed."""


class ModelError(LlmcError):
    """The architecture has no adapter, or does something the engine can't follow."""


class ExportError(LlmcError):
    """A backend can't load the requested scheme, or a written folder fails its check."""


class RunError(LlmcError):
    """The run can't start or go on: disk, an occupied folder, a journal of another run, NaN."""
