"""Where a browser for reports is, if there is one."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

CHROMIUM = os.environ.get("LLMC_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
BROWSER = CHROMIUM is not None and find_spec("playwright") is not None
