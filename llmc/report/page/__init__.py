"""The report of a run as one HTML file, the comparison of several, and the same as plots.

``read`` brings a folder into the dataclasses of ``data``; ``sections`` and ``compare`` say what of it is shown, as
charts (``chart``), heat maps (``heat``) and surfaces (``surface``); ``render`` makes HTML of that with the templates,
style and script in ``assets``.
"""

from .read import read_run
from .write import compare_runs, finish_report, refresh_report, report, write_report

__all__ = ["compare_runs", "finish_report", "read_run", "refresh_report", "report", "write_report"]
