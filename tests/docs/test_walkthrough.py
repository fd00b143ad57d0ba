"""The commands of the quick start, in their order, on a tiny model in the place of its own."""

from __future__ import annotations

import json
import shutil

import pytest
from pages import ROOT, blocks
from tiny import write_byte_model

from llmc import cli

PAGE = ROOT / "docs" / "quickstart.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The project's folder as the page supposes it: the model that the script fetches, and the reader's file."""
    folder = tmp_path_factory.mktemp("quickstart")
    write_byte_model(folder / "models" / "smollm2-135m", width=64)
    shutil.copytree(ROOT / "configs", folder / "configs")
    (block,) = blocks("yaml", page=PAGE)
    (folder / block.title).write_text(block.text, encoding="utf-8")
    return folder


def test_the_commands_run_and_leave_what_the_page_says(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    ran = []
    for command in [words for block in blocks("bash", page=PAGE) for words in block.commands]:
        if command == ["bash", "scripts/quickstart.sh"]:
            command = ["llmc", "--config", "configs/quickstart.yml", "--task_id", "quickstart"]
        if command[0] == "llmc":
            code = cli.main(command[1:])
            printed = capsys.readouterr()
            assert code == 0, f"{command}\n{printed.out}{printed.err}"
            ran.append(printed.out)
    assert len(ran) == 8 and ran[0].count("perplexity (") == 2 and "clean" in ran[1] and "clean" in ran[3]
    quickstart = place / "outputs" / "quickstart"
    names = {path.name for path in quickstart.iterdir() if not path.name.startswith(".")}
    assert names == {"metrics.json", "report.html", "surfaces.safetensors", "vllm_quant_model", "fake_quant_model"}
    measured = [json.loads((place / "outputs" / name / "metrics.json").read_text()) for name in ("mine", "awq")]
    values = [{one["position"]: one["value"] for one in metrics["evaluation"]} for metrics in measured]
    assert values[0]["pretrain"] == values[1]["pretrain"] and values[0]["fake_quant"] != values[1]["fake_quant"]


def test_the_error_that_the_page_shows_is_the_one_that_comes(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    content = (place / "my.yml").read_text()
    weight = "weight: {bit: 4, symetric: True, granularity: per_group, group_size: 64}"
    wrong = f"model: {{path: models/smollm2-135m}}\nquant:\n    method: GPTQ\n    {weight}\n"
    (place / "my.yml").write_text(wrong)
    try:
        assert cli.main(["--config", "my.yml"]) == 2
    finally:
        (place / "my.yml").write_text(content)
    (shown,) = [block.text for block in blocks("text", page=PAGE) if block.text.startswith("error:")]
    assert capsys.readouterr().err.strip() == shown.strip()
