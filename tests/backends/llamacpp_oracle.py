"""The real llama.cpp (llama-cpp-python), in this Python or in that which ``LLMC_LLAMACPP_PYTHON`` names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

WORKER = Path(__file__).with_name("llamacpp_worker.py")


@dataclass(frozen=True)
class LlamaCppJob:
    """What llama.cpp is asked to do with a file: losses of ``chunks`` of ids, and perhaps to go on with a text."""

    model: str
    chunks: list[list[int]]
    prompt: str | None = None
    new_tokens: int = 24
    threads: int = 1


@dataclass(frozen=True)
class LlamaCppResult:
    """Mean cross entropy of each chunk, the prompt's ids by llama.cpp's tokenizer, and its greedy continuation."""

    nll: tuple[float, ...]
    prompt_ids: tuple[int, ...]
    text: str


def llamacpp_python() -> Path | None:
    """The Python with llama.cpp: the named one, that of ``scripts/install_llamacpp.sh``, or this one; or None."""
    if named := os.environ.get("LLMC_LLAMACPP_PYTHON"):
        return Path(named)
    made = Path(__file__).resolve().parents[2] / ".venv-llamacpp" / "bin" / "python"
    if made.is_file():
        return made
    return Path(sys.executable) if find_spec("llama_cpp") else None


def run_llamacpp(jobs: Sequence[LlamaCppJob], python: Path) -> list[LlamaCppResult]:
    """All jobs in one process; raises RuntimeError with its last words if that fails."""
    with tempfile.TemporaryDirectory(prefix="llmc-llamacpp-") as folder:
        asked, answered = Path(folder, "jobs.json"), Path(folder, "out.json")
        asked.write_text(json.dumps([asdict(job) for job in jobs]))
        environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
        command = [str(python), str(WORKER), str(asked), str(answered)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"llama.cpp's process ended with status {done.returncode}\n{done.stderr[-4000:]}")
        answers = json.loads(answered.read_text())
    return [LlamaCppResult(tuple(one["nll"]), tuple(one["prompt_ids"]), one["text"]) for one in answers]
