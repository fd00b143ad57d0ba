"""Killed at any moment, a run that is started again ends with the bytes of a run that was left alone."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from killing import Killer, forked


@pytest.fixture(scope="module")
def forks() -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    with forked() as attempt:
        yield attempt


@pytest.fixture
def killer(case, forks) -> Callable[..., Killer]:
    """Makes a run to be killed, with the bytes that it must end with, and the seconds of the undisturbed run."""

    def make(method: str, **changes: Any) -> Killer:
        calm, run = (case(method=method, **changes) for _ in range(2))
        ended = forks({"arguments": calm.arguments, "log": str(calm.save_path.with_suffix(".log"))})
        assert ended["code"] == 0
        return Killer(run, calm.written(), ended["seconds"], forks, calm.save_path)

    return make


@pytest.mark.parametrize("checkpoint_every", [1, 2])
@pytest.mark.parametrize("method", ["GPTQ", "Awq"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(case, killer, method, checkpoint_every):
    run = killer(method, base={"checkpoint_every": checkpoint_every})
    moments = random.Random(f"{method} {checkpoint_every}")
    while len(run.kills) < 6:
        run.case = case(method=method, base={"checkpoint_every": checkpoint_every})
        while not run.start(after=run.seconds * moments.triangular(0, 0.7, 0.1)):
            assert len(run.kills) < 200
        assert run.case.written() == run.expected
    assert run.kills.count("within") > len(run.kills) / 2, run.kills


def test_killed_at_each_boundary_it_ends_with_the_same_bytes(killer, damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    changes = {"base": {"checkpoint_every": 1}, "eval": {"eval_pos": []}, "save": {"save_fake": False}}
    run = killer("GPTQ", checkpoint=damaged, **changes)
    boundary, ended = 0, False
    while not ended:
        boundary += 1
        shutil.rmtree(run.case.save_path, ignore_errors=True)
        ended = run.start(boundary=boundary, prepared=True)
        assert ended or run.start(prepared=True), boundary
        assert run.case.written() == run.expected, boundary
    assert len(run.kills) == boundary - 1 > 40


def test_killed_one_boundary_later_each_time_it_ends_with_the_same_bytes(killer):
    run = killer("Awq", base={"checkpoint_every": 1})
    while not run.start(boundary=len(run.kills) + 1, prepared=True):
        assert len(run.kills) < 500
    assert run.case.written() == run.expected
    assert run.kills.count("within") > 10


def test_killed_while_the_file_is_assembled_it_ends_with_the_same_bytes(case, killer, pieced, tmp_path):
    folder = shutil.copytree(pieced("llama"), tmp_path / "shallow")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    saved = {"save_vllm": False, "save_fake": False, "save_llamacpp": True}
    run = killer("RTN", checkpoint=folder, eval={"eval_pos": []}, save=saved)
    total = int(run.calm.with_suffix(".log").read_text().split(" boundaries")[0].split()[-1])
    # From the first tensor of the file on: while it's written, named and described, and while its parts are removed.
    found = []
    for boundary in range(total - 40, total, 3):
        shutil.rmtree(run.case.save_path, ignore_errors=True)
        assert not run.start(boundary=boundary, prepared=True)
        left = {path.name for path in (run.case.save_path / "llamacpp_quant_model").iterdir()}
        found.append("whole" if "model.gguf" in left else "torn" if "model.gguf.tmp" in left else "nothing")
        assert run.start(prepared=True), boundary
        assert run.case.written() == run.expected, boundary
    assert {"torn", "whole"} <= set(found), found
