"""Scores checkpoints with the real vLLM on a CPU: ``python vllm_worker.py JOBS.json OUT.json``.

It is run by the Python of vLLM's own environment (``scripts/install_vllm_cpu.sh``) and so imports nothing of llmc; the
tests talk to it through ``vllm_oracle.py``. JOBS is a list of objects

    {name, folder, token_ids: [[int, ...], ...], prompts: [str, ...], max_new_tokens, dtype}

and OUT becomes a list, in the same order, of

    {name, mean_logprob: [float, ...], n_tokens, samples: [str, ...], error: str | null, seconds}

``mean_logprob`` has for each chunk of ``token_ids`` the mean log-probability of its tokens but the first, each given
all before it; ``n_tokens`` is the number of tokens so scored; ``samples`` are the greedy continuations of ``prompts``;
``seconds`` is the job's wall time, from loading the checkpoint on. vLLM is imported once, and every job runs in a fork
of that process: a checkpoint that vLLM refuses, or on which it dies, costs only its own job.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]
Result = dict[str, Any]

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process: loads faster, ends cleanly
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default vLLM pins threads to cores that others may be using
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # room for the one token vLLM must generate after a chunk of full length
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; if unset vLLM takes a share of all memory
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": str(min(8, len(os.sched_getaffinity(0)))),
}
MIN_CONTEXT = 512
STAND_INS = "LLMC_VLLM_STAND_INS"  # schemes whose products are computed in plain torch


def set_environment() -> None:
    """Set what vLLM reads when it is imported; DEFAULTS give way to the caller's own settings."""
    os.environ.update(ENVIRONMENT)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def result_of(job: Job, **values: Any) -> Result:
    """A result with every field, those not given being empty."""
    empty: Result = {"mean_logprob": [], "n_tokens": 0, "samples": [], "error": None, "seconds": 0.0}
    return {"name": job["name"], **empty, **values}


def load(job: Job) -> Any:
    """Load the job's checkpoint into an engine that compiles nothing and is just long enough."""
    from vllm import LLM

    longest = max((len(chunk) for chunk in job["token_ids"]), default=0)
    return LLM(
        job["folder"],
        dtype=job["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=not job["prompts"],
        max_model_len=max(MIN_CONTEXT, longest + 1),
        max_num_seqs=8,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        seed=0,
    )


def mean_logprobs(llm: Any, chunks: list[list[int]]) -> list[float]:
    """Mean log-probability of each chunk's tokens but the first."""
    from vllm import SamplingParams

    if not chunks:
        return []
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": chunk} for chunk in chunks], params, use_tqdm=False)
    means = []
    for chunk, output in zip(chunks, outputs, strict=True):
        scored = zip(chunk[1:], output.prompt_logprobs[1:], strict=True)
        logprobs = [position[token].logprob for token, position in scored]
        means.append(sum(logprobs) / len(logprobs))
    return means


def greedy_texts(llm: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy continuation of each prompt."""
    from vllm import SamplingParams

    if not prompts:
        return []
    params = SamplingParams(temperature=0, max_tokens=max_new_tokens)
    return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]


def run_job(job: Job) -> Result:
    """Do one job in this process; an exception becomes the result's error."""
    start = time.monotonic()
    try:
        llm = load(job)
        values: Result = {
            "mean_logprob": mean_logprobs(llm, job["token_ids"]),
            "n_tokens": sum(len(chunk) - 1 for chunk in job["token_ids"]),
            "samples": greedy_texts(llm, job["prompts"], job["max_new_tokens"]),
        }
    except BaseException:
        values = {"error": traceback.format_exc()}
    return result_of(job, **values, seconds=time.monotonic() - start)


def run_in_fork(job: Job) -> Result:
    """Do one job in a child of this process; a child that dies without a word becomes an error as well."""
    start = time.monotonic()
    read_end, write_end = os.pipe()
    try:
        child = os.fork()
    except OSError:
        os.close(read_end)
        os.close(write_end)
        return run_job(job)
    if child == 0:
        os.close(read_end)
        with os.fdopen(write_end, "w") as pipe:
            json.dump(run_job(job), pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    try:
        return json.loads(answer)
    except json.JSONDecodeError:
        code = os.waitstatus_to_exitcode(status)
        cause = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return result_of(job, error=f"the process of this job {cause}", seconds=time.monotonic() - start)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what vLLM prints to stderr, whose tail the caller shows if something goes wrong."""
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def install_stand_ins(schemes: list[str]) -> None:
    """Compute the products of these schemes in plain torch."""
    if "W4A16" in schemes:
        import vllm_wna16

        vllm_wna16.install()
    if "W8A8" in schemes:
        import vllm_int8

        vllm_int8.install()


def write(results: list[Result], path: Path) -> None:
    """Replace the file at once, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(path)


def main(jobs_path: Path, out_path: Path) -> None:
    jobs: list[Job] = json.loads(jobs_path.read_text())
    set_environment()
    results: list[Result] = []
    with stdout_to_stderr():
        import vllm  # noqa: F401 - before the forks, which share it

        install_stand_ins(os.environ.get(STAND_INS, "").split())
        for job in jobs:
            results.append(run_in_fork(job))
            write(results, out_path)
    write(results, out_path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: vllm_worker.py JOBS.json OUT.json")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
