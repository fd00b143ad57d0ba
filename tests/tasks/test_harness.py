"""Tasks answered from logits against lm-eval by itself on the same folder."""

from __future__ import annotations

from functools import partial

import pytest
from own_tasks import whole_logits
from transformers import AutoTokenizer

from llmc.config.suggest import did_you_mean
from llmc.errors import ConfigError, DataError
from llmc.eval import harness
from llmc.eval.harness import TaskOptions, find_tasks
from llmc.eval.scoring import score

LIMIT = 64
OPTIONS = TaskOptions(num_fewshot=2, limit=10)


@pytest.fixture
def quick(monkeypatch):
    """lm-eval's own tasks take many seconds to index: a test does with some names."""
    from lm_eval import tasks

    class Few(tasks.TaskManager):
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)
            self._all_tasks += ["hellaswag", "winogrande"] * include_defaults

    monkeypatch.setattr(tasks, "TaskManager", Few)


def answers(tasks, folder, model, passes, generate=None):
    """A model that answers from its logits; every pass over it is counted."""
    from llmc.eval.streamed_lm import StreamedLM

    def logits(batches, visit):
        passes.append(len(batches))
        whole_logits(model, chunk=20)(batches, visit)

    ask = partial(score, logits=logits, limit=LIMIT, batch_size=4)
    return StreamedLM(AutoTokenizer.from_pretrained(folder), LIMIT, ask, generate, tasks.instances)


def test_scores_are_those_of_lm_eval_by_itself(folder, model, own_tasks, monkeypatch):
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    # What lm-eval finds out about the machine takes seconds, and is of no interest here.
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    tasks = find_tasks(["own_both"], str(own_tasks), OPTIONS, did_you_mean)
    passes: list[int] = []
    lm = answers(tasks, folder, model, passes)
    found = {(one.name, one.metric): one for one in tasks.evaluate(lm, "pretrain", "by test")}
    oracle = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=["own_choices", "own_rolling"],
        task_manager=TaskManager(include_path=str(own_tasks), include_defaults=False),
        num_fewshot=2,
        limit=10,
        device="cpu",
    )
    wanted = oracle["results"]
    assert len(passes) == 1
    for metric in ("acc", "acc_norm"):
        assert found["own_choices", metric].value == wanted["own_choices"][f"{metric},none"]
        assert found["own_choices", metric].stderr == pytest.approx(wanted["own_choices"][f"{metric}_stderr,none"])
    rolling = found["own_rolling", "word_perplexity"]
    assert rolling.value == pytest.approx(wanted["own_rolling"]["word_perplexity,none"], rel=1e-5)
    assert rolling.stderr is None  # and lm-eval says N/A
    assert found["own_choices", "acc"].samples == 10 and rolling.samples == 5
    assert "task version 1.0, 2-shot, limit 10, by test" in found["own_choices", "acc"].protocol
    own = {name: [one.resps for one in task.instances] for name, task in tasks.loaded["tasks"].items()}
    for name, documents in oracle["samples"].items():
        told = [resp for document in documents for resp in document["resps"]]
        assert len(told) == len(own[name])
        for one, other in zip(own[name], told, strict=True):
            compare(one[0], other[0])


def compare(one, other):
    """A sum of log-probabilities, with or without whether it is the greedy one."""
    if isinstance(one, tuple):
        assert one[0] == pytest.approx(float(other[0]), abs=2e-5)
        assert str(one[1]) == str(other[1])
    else:
        assert one == pytest.approx(float(other), abs=2e-4)


def test_a_second_model_is_asked_the_same(folder, model, own_tasks):
    tasks = find_tasks(["own_choices"], str(own_tasks), OPTIONS, did_you_mean)
    prompts = []
    for _ in range(2):
        tasks.evaluate(answers(tasks, folder, model, []), "pretrain", "by test")
        prompts.append([one.args for one in tasks.instances()])
    assert prompts[0] == prompts[1]


def test_tasks_say_who_writes_text(own_tasks):
    tasks = find_tasks(["own_choices", "own_writing"], str(own_tasks), TaskOptions(), did_you_mean)
    assert tasks.generating == ["own_writing"] and tasks.scoring == ["own_choices"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_choice", "has no task 'own_choice'; did you mean 'own_choices'?"),
        ("helaswag", "has no task 'helaswag'; did you mean 'hellaswag'?"),
    ],
)
def test_an_unknown_task_is_named_with_its_neighbour(own_tasks, quick, name, said):
    with pytest.raises(ConfigError, match=r"eval\.tasks") as caught:
        find_tasks([name], str(own_tasks), TaskOptions(), did_you_mean)
    assert said in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"eval.path: there is no folder .*missing"):
        find_tasks(["own_choices"], str(tmp_path / "missing"), TaskOptions(), did_you_mean)


def test_data_that_cannot_be_had_is_one_message(own_tasks, tmp_path):
    text = (own_tasks / "choices.yaml").read_text().replace("choices.jsonl", "gone.jsonl")
    (tmp_path / "gone.yaml").write_text(text)
    with pytest.raises(DataError, match="the data of own_choices can't be loaded") as caught:
        find_tasks(["own_choices"], str(tmp_path), TaskOptions(), did_you_mean)
    assert "HF_HOME" in str(caught.value)


def test_code_of_a_model_runs_only_when_asked(own_tasks, tmp_path):
    (tmp_path / "code.yaml").write_text((own_tasks / "choices.yaml").read_text() + "unsafe_code: true\n")
    with pytest.raises(ConfigError, match="runs code that the model wrote"):
        find_tasks(["own_choices"], str(tmp_path), TaskOptions(), did_you_mean)
    find_tasks(["own_choices"], str(tmp_path), TaskOptions(unsafe_code=True), did_you_mean)


def test_lm_eval_that_is_not_installed_is_named(monkeypatch, own_tasks):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"lm-eval.*can't be imported") as caught:
        harness.find_tasks(["own_choices"], str(own_tasks), TaskOptions(), did_you_mean)
    assert "pip install 'llmc[eval]'" in str(caught.value)
