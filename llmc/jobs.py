"""Evaluations of what a run wrote, on tasks and prompts: what is to be asked, checked before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .config.schema import EvalConfig
from .config.suggest import did_you_mean
from .data.records import Chat, Placed, Prompt, Question, read_records
from .data.tokens import encode
from .errors import ConfigError, DataError
from .eval.greedy import Tokens
from .eval.harness import TaskOptions, Tasks, find_tasks
from .eval.server import import_api
from .quant import PerTensor
from .whole import context_length, whole_bytes, why_not_whole

if TYPE_CHECKING:
    from .prepare import Prepared

TASKS, PROMPTS = "lm_eval", "generate_only"


@dataclass(frozen=True)
class TaskJob:
    """Tasks for some states of the model."""

    section: EvalConfig
    tasks: Tasks


@dataclass(frozen=True)
class PromptJob:
    """Prompts for some states of the model.

    Attributes:
        section: where they stand in the configuration.
        prompts: as the model is shown them.
        tokens: the same as token ids.
        protocol: how they became tokens, in words.
    """

    section: EvalConfig
    prompts: tuple[str, ...]
    tokens: tuple[Tokens, ...]
    protocol: str


@dataclass(frozen=True)
class Jobs:
    """Everything to be asked.

    Attributes:
        tasks: for lm-eval.
        prompts: to be continued.
        tokenizer: the model's; None where there is nothing to ask.
        limit: how many tokens the model reads.
        warnings: what will take long.
    """

    tasks: tuple[TaskJob, ...] = ()
    prompts: tuple[PromptJob, ...] = ()
    tokenizer: Any = None
    limit: int = 0
    warnings: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.tasks or self.prompts)


def prepare_jobs(prepared: Prepared, tokenizer: Any) -> Jobs:
    """Find the tasks and read the prompts of a configuration.

    Args:
        prepared: the model and what is made of it.
        tokenizer: the model's.

    Raises:
        ConfigError: a task isn't there, lm-eval isn't, or text can't be generated where it's asked to be.
        DataError: a task's data can't be had, or a prompt is malformed or too long.
    """
    asked = [one for one in prepared.config.eval if one.eval_pos and one.type in (TASKS, PROMPTS)]
    if not asked:
        return Jobs()
    limit = context_length(prepared.skeleton.model.config, tokenizer)
    tasks = tuple(_task_job(prepared, one) for one in asked if one.type == TASKS)
    prompts = tuple(_prompt_job(prepared, one, tokenizer, limit) for one in asked if one.type == PROMPTS)
    warnings = [line for job in prompts for line in _costs(prepared, job)]
    return Jobs(tasks, prompts, tokenizer, limit, warnings)


def depends_on_batch(prepared: Prepared, position: str) -> bool:
    """Whether a text's outputs depend on what is beside it in a batch: one scale for a whole input, found on it."""
    if not position.startswith("fake_quant"):
        return False
    return any(act.observer is None and isinstance(act.grid.granularity, PerTensor) for act in prepared.recipe.acts)


def _task_job(prepared: Prepared, section: EvalConfig) -> TaskJob:
    options = TaskOptions(
        section.num_fewshot, section.limit, section.apply_chat_template, section.confirm_run_unsafe_code
    )
    if section.server is not None:
        import_api()
    tasks = find_tasks(section.tasks, section.path, options, did_you_mean)
    for position in section.eval_pos if section.server is None and tasks.generating else ():
        if reason := why_not_whole(prepared, position):
            raise ConfigError(
                f"eval.tasks: {tasks.generating[0]} lets the model write text, for which it's loaded whole, and "
                f"{position} can't be: {reason}",
                "serve the written folder, as with `vllm serve`, and name that in eval.server",
            )
    return TaskJob(section, tasks)


def _prompt_job(prepared: Prepared, section: EvalConfig, tokenizer: Any, limit: int) -> PromptJob:
    path = section.path or ""
    records = read_records(path)
    texts = tuple(_text(one, tokenizer, chat=section.apply_chat_template) for one in records)
    # A chat template writes the special tokens itself.
    ids = tuple(tuple(encode(tokenizer, text, special=not section.apply_chat_template).tolist()) for text in texts)
    known = len(prepared.skeleton.model.get_input_embeddings().weight)
    for number, (record, tokens) in enumerate(zip(records, ids, strict=True), 1):
        _check_prompt(number, record, tokens, section.max_new_tokens, limit, known)
    template = ", chat template" if section.apply_chat_template else ""
    protocol = f"{len(texts)} prompts, greedy, at most {section.max_new_tokens} new tokens{template}"
    return PromptJob(section, texts, ids, protocol)


def _check_prompt(number: int, record: Placed, tokens: Sequence[int], new: int, limit: int, known: int) -> None:
    where = f"eval.path: prompt {number} ({record.where})"
    if not tokens:
        raise DataError(f"{where} has no token", "write more, or leave it out")
    if max(tokens) >= known:
        raise DataError(
            f"{where} has the token {max(tokens)}, but the model knows only {known}",
            "do the tokenizer and the model belong together?",
        )
    if len(tokens) + new > limit:
        raise DataError(
            f"{where} has {len(tokens)} tokens, and {new} new ones shall follow; the model reads {limit}",
            "shorten the prompt, or set eval.max_new_tokens lower",
        )


def _text(placed: Placed, tokenizer: Any, *, chat: bool) -> str:
    """What the model is shown of a record."""
    record = placed.record
    if isinstance(record, Chat):
        if not chat:
            raise DataError(
                f"{placed.where} is a chat, which becomes text by a chat template", "set eval.apply_chat_template: True"
            )
        turns = record.turns
    else:
        text = record.prompt if isinstance(record, Prompt) else None
        text = record.question if isinstance(record, Question) else text
        if text is None:
            raise DataError(
                f"{placed.where} holds a text, not a prompt", 'write {"prompt": "..."} to have it continued'
            )
        if not chat:
            return text
        turns = [{"role": "user", "content": text}]
    if not tokenizer.chat_template:
        raise DataError(
            "eval.apply_chat_template: this model's tokenizer has no chat template", "set it to False, and give prompts"
        )
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as problem:  # the template is a program from the checkpoint: it may raise anything
        raise DataError(f"{placed.where}: the chat template refuses it: {problem}", "mend the chat") from problem


def _costs(prepared: Prepared, job: PromptJob) -> list[str]:
    """What it costs where a model can't be had whole."""
    size = whole_bytes(prepared) / 1e9
    return [
        f"generate_only ({position}): {reason}; so it's streamed, and each of at most {job.section.max_new_tokens} new "
        f"tokens is a pass over all weights ({size:.1f} GB)"
        for position in job.section.eval_pos
        if (reason := why_not_whole(prepared, position))
    ]
