"""Whether a folder with a model is whole, and holds what its ``config.json`` says, whoever wrote it."""

from .findings import Finding, Report
from .folder import verify

__all__ = ["Finding", "Report", "verify"]
