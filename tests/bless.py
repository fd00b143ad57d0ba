"""Measure the golden perplexities anew: ``python tests/bless.py``. Say in the commit why they changed."""

from __future__ import annotations

import json

from real import GOLDEN, measure, real_model

if __name__ == "__main__":
    before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    after = measure(real_model())
    for name, value in after.items():
        print(f"{name}: {before.get(name)} -> {value}")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(after, indent=2) + "\n")
