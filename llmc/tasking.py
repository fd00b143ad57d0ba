"""Asks tasks and prompts of what a run wrote, and of the original: by streaming, as a whole, or on a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LlmcError, RunError
from .eval.greedy import Tokens, greedy_streamed, greedy_whole
from .eval.results import Continued, Generated, TaskScore
from .eval.scoring import Logits, score
from .eval.server import Server
from .evaluating import Evaluable, stream_logits
from .finished import open_finished, read_metrics
from .jobs import PromptJob, TaskJob, depends_on_batch
from .stream.memory import give_back_memory
from .stream.options import Listener
from .whole import whole_model, why_not_whole

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from .prepare import Prepared

Answered = TaskScore | Generated


@dataclass(frozen=True)
class States:
    """States of a model, to be asked.

    Attributes:
        prepared: the configuration.
        run: the folder of a finished run; None where there is only the original.
        listener: hears of progress.
    """

    prepared: Prepared
    run: Path | None
    listener: Listener

    def logits(self, position: str) -> Logits:
        """A state, streamed block by block."""
        model = Evaluable.original(self.prepared)
        if position != "pretrain" and self.run is not None:
            model = open_finished(self.run, read_metrics(self.run), self.prepared)
        return partial(stream_logits, model, position, listener=self.listener)

    def scores(self, position: str, batch_size: int) -> Any:
        """Finds likelihoods in one pass over a state."""
        alone = depends_on_batch(self.prepared, position)
        limit = self.prepared.jobs.limit
        return partial(score, logits=self.logits(position), limit=limit, batch_size=batch_size, alone=alone)

    def written(self, requests: Sequence[Instance], position: str, batch_size: int) -> list[str]:
        """Texts that a state writes for lm-eval, loaded whole, by lm-eval's own class."""
        from lm_eval.models.huggingface import HFLM

        whole = whole_model(self.prepared, self.run, position)
        self.listener.phase(f"generating ({position})")
        tokenizer = self.prepared.jobs.tokenizer
        lm = HFLM(pretrained=whole.load(), tokenizer=tokenizer, batch_size=batch_size, device=str(whole.device))
        made: list[str] = lm.generate_until(list(requests), disable_tqdm=True)
        del lm
        give_back_memory()
        return made


def run_jobs(prepared: Prepared, run: Path | None, listener: Listener) -> list[Answered]:
    """Ask everything that the configuration asks of tasks and prompts.

    Args:
        prepared: the configuration.
        run: the folder of its finished run; None where only the original is asked.
        listener: hears of progress.

    Raises:
        LlmcError: a server isn't there or fails, or what the run wrote can't be read.
    """
    states, jobs = States(prepared, run, listener), prepared.jobs
    found: list[Answered] = []
    for task in jobs.tasks:
        for position in task.section.eval_pos:
            found += _ask_server(states, task) if task.section.server else _ask_tasks(states, task, position)
    for prompts in jobs.prompts:
        found += [_continue(states, prompts, position) for position in prompts.section.eval_pos]
    return found


def _ask_tasks(states: States, job: TaskJob, position: str) -> list[TaskScore]:
    from .eval.streamed_lm import StreamedLM

    jobs, section = states.prepared.jobs, job.section
    states.listener.phase(f"tasks ({position})")
    generate = partial(states.written, position=position, batch_size=section.bs)
    ask = states.scores(position, section.bs)
    lm = StreamedLM(jobs.tokenizer, jobs.limit, ask, generate, job.tasks.instances)
    dtype = str(states.prepared.skeleton.model.dtype).removeprefix("torch.")
    return job.tasks.evaluate(lm, position, f"by llmc in {dtype}")


def _ask_server(states: States, job: TaskJob) -> list[TaskScore]:
    section, jobs = job.section, states.prepared.jobs
    tokenizer = jobs.tokenizer
    server = Server.find(section.server or "", section.server_model)
    states.listener.phase(f"tasks ({server.url})")
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if job.tasks.scoring:
        server.check_logprobs(tokenizer("a").input_ids[-1])
    lm = server.lm(states.prepared.folder, jobs.limit, section.bs, adds_begin=begins)
    try:
        return job.tasks.evaluate(lm, section.eval_pos[0], f"by {server.model} on a server")
    except LlmcError:
        raise
    except Exception as problem:  # lm-eval raises whatever it stumbles upon when a server stops answering
        raise RunError(
            f"eval.server: {server.url} failed while it was asked: {type(problem).__name__}: {problem}",
            "see what the server says, and run `python -m llmc eval` with the same file",
        ) from problem


def _continue(states: States, job: PromptJob, position: str) -> Generated:
    prepared, section = states.prepared, job.section
    tokenizer, limit = prepared.jobs.tokenizer, prepared.jobs.limit
    end = tokenizer.eos_token_id
    ends = () if end is None else (int(end),)
    new: list[Tokens]
    states.listener.phase(f"generating ({position})")
    if why_not_whole(prepared, position):
        alone, logits = depends_on_batch(prepared, position), states.logits(position)
        new = greedy_streamed(
            job.tokens, logits, section.max_new_tokens, ends, limit, batch_size=section.bs, alone=alone
        )
    else:
        model = whole_model(prepared, states.run, position).load()
        new = greedy_whole(job.tokens, model, section.max_new_tokens, ends)
        del model
        give_back_memory()
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]
    samples = tuple(Continued(*pair) for pair in zip(job.prompts, texts, strict=True))
    return Generated(section.name or Path(section.path or "").name, position, samples, job.protocol)
