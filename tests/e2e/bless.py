"""Measure the golden perplexities anew: ``python tests/e2e/bless.py``. Say in the commit why they changed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from real import GOLDEN, cut, measure, real_model

if __name__ == "__main__":
    before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        after = measure(cut(real_model(), Path(folder) / "cut"))
    for name, value in after.items():
        print(f"{name}: {before.get(name)} -> {value}")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(after, indent=2) + "\n")
