"""lm-eval's tasks: found by their names, loaded with their data, and evaluated; numbers are as lm-eval has them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ConfigError, DataError
from .results import TaskScore

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

GENERATING = "generate_until"
_SEED = 1234  # lm-eval's own, so that its examples in a prompt are those that it would take by itself
_BOOTSTRAPS = 1000  # for standard errors that have no formula: two digits of them

DidYouMean = Callable[[object, Sequence[str]], str]


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are evaluated.

    Attributes:
        num_fewshot: examples in a prompt; None: as each task has it.
        limit: only so many documents of each task, or below 1 such a share of them; None: all.
        apply_chat_template: whether prompts are written as conversations.
        unsafe_code: whether tasks may run code that the model wrote.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    unsafe_code: bool = False


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data.

    Attributes:
        loaded: what lm-eval's ``TaskManager.load`` returns: ``tasks``, ``groups`` and ``group_map``.
        options: how to evaluate them.
    """

    loaded: Mapping[str, Any]
    options: TaskOptions

    @property
    def generating(self) -> list[str]:
        """Names of the tasks for which a model writes text."""
        return [name for name, task in self.loaded["tasks"].items() if task.OUTPUT_TYPE == GENERATING]

    @property
    def scoring(self) -> list[str]:
        """Names of the others, which need log-probabilities."""
        return [name for name in self.loaded["tasks"] if name not in self.generating]

    def instances(self) -> Iterator[Instance]:
        """All requests; there once lm-eval has built them."""
        for task in self.loaded["tasks"].values():
            yield from task.instances

    def evaluate(self, lm: LM, position: str, how: str) -> list[TaskScore]:
        """Let lm-eval ask a model.

        Args:
            lm: the model.
            position: its state.
            how: how answers are computed, for the protocol.

        Returns:
            One score for each metric of each task and group.
        """
        from lm_eval.evaluator import evaluate

        _seed()
        for task in self.loaded["tasks"].values():
            _set_examples(task, self.options.num_fewshot)
        with _one_process():
            results = evaluate(
                lm,
                self.loaded,
                limit=self.options.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
                apply_chat_template=self.options.apply_chat_template,
                fewshot_as_multiturn=self.options.apply_chat_template,
                confirm_run_unsafe_code=self.options.unsafe_code,
            )
        return scores_of(results, position, how, self.options)


def find_tasks(names: Sequence[str], folder: str | None, options: TaskOptions, did_you_mean: DidYouMean) -> Tasks:
    """Look tasks up by their names and load them, the data sets included. No weight is read.

    Args:
        names: of tasks, groups or tags.
        folder: with task files of one's own, whose names go before lm-eval's; or None.
        options: how they will be evaluated.
        did_you_mean: makes a hint of a name and those that there are.

    Raises:
        ConfigError: there is no such task or folder, lm-eval isn't installed, or a task runs a model's code unasked.
        DataError: a data set can't be had.
    """
    import_lm_eval()
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise ConfigError(f"eval.path: there is no folder {folder}", "name the folder that holds your task files")
    manager = _manager(names, None if folder is None else str(Path(folder).expanduser()), did_you_mean)
    tasks = Tasks(_load(manager, names), options)
    unsafe = [name for name, task in tasks.loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not options.unsafe_code:
        raise ConfigError(
            f"eval.tasks: {unsafe[0]} runs code that the model wrote, on this machine",
            "do that in a container only, and set eval.confirm_run_unsafe_code: True",
        )
    return tasks


def import_lm_eval() -> None:
    """Import lm-eval.

    Raises:
        ConfigError: it isn't installed.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as problem:
        raise ConfigError(
            f"eval.type: lm_eval needs lm-eval, which can't be imported: {problem}", "pip install 'llmc[eval]'"
        ) from problem


def _manager(names: Sequence[str], folder: str | None, did_you_mean: DidYouMean) -> TaskManager:
    """An index that has all the names. That of lm-eval's own thousands takes many seconds, so one's own come first."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    if all(_is_whole(manager, name) for name in names):
        return manager
    manager = TaskManager(include_path=folder)
    known = manager.all_tasks
    for name in names:
        if name not in known:
            where = "lm-eval" if folder is None else f"lm-eval or {folder}"
            raise ConfigError(
                f"eval.tasks: {where} has no task {name!r}{did_you_mean(name, known)}",
                "`lm-eval ls tasks` lists lm-eval's; eval.path is a folder with task files of your own",
            )
    return manager


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether an index has a task, or a group with all its members."""
    entry = manager.task_index.get(name)
    members = (entry.cfg or {}).get("task", []) if entry is not None and name in manager.all_groups else []
    named = [member if isinstance(member, str) else str(member.get("task")) for member in members]
    return entry is not None and all(_is_whole(manager, member) for member in named)


def _load(manager: TaskManager, names: Sequence[str]) -> Mapping[str, Any]:
    try:
        loaded: Mapping[str, Any] = manager.load(list(names))
    except ValueError as problem:
        if "Duplicate task" not in str(problem):
            raise _unfetched(names, problem) from problem
        raise ConfigError(f"eval.tasks: {problem}", "leave out the task, or the group that has it") from problem
    except Exception as problem:  # network, hub, cache, parser and a task's own code each raise their own kinds
        raise _unfetched(names, problem) from problem
    return loaded


def _unfetched(names: Sequence[str], problem: Exception) -> DataError:
    told = " ".join(str(problem).split())
    return DataError(
        f"eval.tasks: the data of {', '.join(names)} can't be loaded: {type(problem).__name__}: {told[:300]}",
        "without a connection, fetch it once where there is one and copy the cache (HF_HOME), or write a task file "
        "that reads local data (docs/tasks.md)",
    )


def _seed() -> None:
    """The seeds that lm-eval sets by itself."""
    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


@contextmanager
def _one_process() -> Iterator[None]:
    """lm-eval doesn't fork for its standard errors: a process that holds a model would be copied."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _set_examples(task: Any, asked: int | None) -> None:
    """How many examples stand in a prompt; a task that has none on purpose is left alone, as lm-eval does."""
    own = task.get_config("num_fewshot")
    if own is None or (asked is not None and own != 0):
        task.set_config(key="num_fewshot", value=asked or 0)
    task.set_fewshot_seed(seed=_SEED)


def scores_of(results: Mapping[str, Any], position: str, how: str, options: TaskOptions) -> list[TaskScore]:
    """lm-eval's results as scores, metric by metric."""
    found = []
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        shots = results["n-shot"].get(name)
        limited = "" if options.limit is None else f", limit {options.limit:g}"
        about = f"lm-eval {version('lm-eval')}, task version {results['versions'].get(name)}"
        about += f", {'fewshot as in its tasks' if shots is None else f'{shots}-shot'}{limited}"
        about += f"{', chat template' if options.apply_chat_template else ''}, {how}"
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else key
            stderr = float(error) if isinstance(error, int | float) else None
            samples = int(values.get("sample_len", 0))
            found.append(TaskScore(name, position, shown, float(value), stderr, samples, about))
    return found
