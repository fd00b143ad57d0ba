"""What runs by itself: workflows, the launcher, the texts of protocol P1."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time

import pytest
import yaml
from real import text

from scripts import p1_texts
from scripts.reproduce import ROOT, SUITES, parser

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS = {"actions/checkout", "actions/setup-python", "actions/cache", "actions/upload-artifact"}


def steps(file):
    content = yaml.safe_load(file.read_text())
    return [step for job in content["jobs"].values() for step in job["steps"]]


def test_there_are_workflows_for_tests_the_night_and_a_gpu():
    assert [file.stem for file in WORKFLOWS] == ["nightly", "reproduce", "tests"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_uses_known_actions_and_files_that_exist(file):
    content = yaml.safe_load(file.read_text())
    assert content["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in content["jobs"].values())
    for step in steps(file):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            name, version = step["uses"].split("@")
            assert name in ACTIONS and re.fullmatch(r"v\d+", version)
            continue
        for path in re.findall(r"\b(?:scripts|configs|benchmarks)/[\w./-]+", step["run"]):
            assert (ROOT / path).exists(), path
        assert "${{" not in step["run"]  # what somebody typed reaches a shell through the environment only
        subprocess.run(["bash", "-n", "-c", step["run"]], check=True)
        known = {option for action in parser()._actions for option in action.option_strings}
        if "reproduce.py" in step["run"]:
            assert set(re.findall(r"(?<!\S)--[\w-]+", step["run"].replace("(", " "))) <= known


def test_every_suite_can_be_chosen():
    content = yaml.safe_load((ROOT / ".github" / "workflows" / "reproduce.yml").read_text())
    inputs = content[True]["workflow_dispatch"]["inputs"]  # YAML reads "on" as True
    assert set(inputs["suite"]["options"]) == {file.parent.name for file in SUITES.glob("*/suite.toml")}


def test_the_launcher_starts_a_run_in_the_background(tmp_path):
    """As it's written: log, process id, arguments, and the environment of the run."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "python": str(python), "config": "my.yml", "task_name": "mine"}
    environment.pop("PYTHONPATH", None)
    launcher = ["bash", str(ROOT / "scripts" / "run_llmc.sh"), "--set", "base.seed=1"]
    said = subprocess.run(launcher, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    wanted = f"{ROOT} -m llmc --config my.yml --task_id mine --set base.seed=1\n"
    until = time.monotonic() + 30
    while (tmp_path / "mine.log").read_text() != wanted and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / "mine.log").read_text() == wanted
    assert f"process {int((tmp_path / 'mine.pid').read_text())}" in said


@pytest.mark.parametrize("name", ["valid", "test"])
def test_the_texts_of_p1_are_made_of_the_lines_on_the_hub(name, tmp_path):
    with open(text(name), encoding="utf-8", newline="") as file:
        whole = file.read()
    lines = [line if line.strip() else "" for line in whole.splitlines(keepends=True)]  # as the hub has them
    p1_texts.write(tmp_path, name, p1_texts.joined(lines))
    digest = hashlib.sha256((tmp_path / f"{name}.txt").read_bytes()).hexdigest()
    assert digest == hashlib.sha256(whole.encode()).hexdigest()
    with pytest.raises(SystemExit, match=f"{name}: the text isn't that of protocol P1"):
        p1_texts.write(tmp_path, name, p1_texts.joined(lines[:-1]))
