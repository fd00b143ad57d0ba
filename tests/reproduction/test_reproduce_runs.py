"""Whole suites: real runs of two cells on a small trained model, and what is wrong, missing or already done."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from dry import write_bytes_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import llmc
from llmc.algorithms import columnwise
from scripts.reproduce import ROOT, main
from scripts.reproduction.running import execute

ALICE = ROOT / "configs" / "data" / "alice.txt"
STEPS, LENGTH = 250, 64
GPTQ = """
[[cell]]
id = "gptq"
config = "gptq.yml"
model = "smollm2-135m"
compare = [{golden = true, tolerance = 0.05}]
"""
RTN = """
[[cell]]
id = "rtn"
config = "rtn.yml"
model = "smollm2-135m"
set = ["eval.eval_pos=[pretrain, fake_quant]"]
compare = [{golden = true, tolerance = 0.001}, {position = "pretrain", golden = true, tolerance = 0.001}]
"""
SUITE = f'title = "Two cells"\nset = ["base.threads=1"]\n{GPTQ}{RTN}'


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model that has learned some letters of English, so that its perplexity means something."""
    folder = tmp_path_factory.mktemp("models") / "SmolLM2-135M"
    folder.mkdir()
    size = {"vocab_size": write_bytes_tokenizer(folder), "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**size, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(ALICE.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (8,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    return folder.parent


@pytest.fixture
def suite(tmp_path):
    """A suite of two cells, 2 bits."""
    folder = tmp_path / "two"
    folder.mkdir()
    text = {"name": "text", "path": "alice.txt", "seq_len": LENGTH}
    content = {
        "base": {"device": "cpu"},
        "model": {"path": "model", "torch_dtype": "float32"},
        "calib": {**text, "n_samples": 32, "preproc": "sequential"},
        "eval": {**text, "num_chunks": 16, "eval_pos": ["fake_quant"]},
        "quant": {
            "method": "GPTQ",
            "weight": {"bit": 2, "symmetric": True, "granularity": "per_group", "group_size": 64},
        },
        "save": {"save_path": "out"},
    }
    (folder / "gptq.yml").write_text(yaml.safe_dump(content))
    del content["calib"]
    content["quant"]["method"] = "RTN"
    (folder / "rtn.yml").write_text(yaml.safe_dump(content))
    (folder / "suite.toml").write_text(SUITE)
    return folder


@pytest.fixture
def reproduce(suite, models, tmp_path):
    """Runs the program on the suite; cells run in this process, in which a test can break something."""
    runs = []

    def in_process(config, overrides, log):
        runs.append(config.stem)
        log.write_text("")
        llmc.compress(config, overrides)
        return 0

    def call(*arguments, execute=in_process):
        places = ["--models", str(models), "--data", str(ALICE.parent), "--work", str(tmp_path / "work")]
        return main(["--suite", str(suite), *places, *arguments], execute)

    call.runs = runs
    return call


def test_a_suite_becomes_green_with_golden_numbers_and_red_when_gptq_breaks(
    reproduce, suite, tmp_path, monkeypatch, capsys
):
    page = tmp_path / "pages" / "two.md"
    assert reproduce("--only", "gptq") == 1
    assert "no golden number" in capsys.readouterr().out
    assert reproduce("--update-golden") == 0
    golden = json.loads((suite / "golden.json").read_text())
    assert set(golden) == {"gptq/fake_quant/text", "rtn/fake_quant/text", "rtn/pretrain/text"}
    assert golden["gptq/fake_quant/text"]["value"] < 0.95 * golden["rtn/fake_quant/text"]["value"]
    before = (suite / "golden.json").read_bytes()
    reproduce.runs.clear()
    assert reproduce("--resume", "--output", str(page)) == 0
    assert reproduce.runs == []
    assert "**3 numbers: 3 within.**" in page.read_text()

    def without_feedback(work, upper, rule, **options):
        """GPTQ whose columns don't make up for each other's errors."""
        return unbroken(work, torch.eye(upper.shape[-1]).expand_as(upper), rule, **options)

    unbroken = columnwise.replace_columns
    monkeypatch.setattr(columnwise, "replace_columns", without_feedback)
    capsys.readouterr()
    assert reproduce("--output", str(page)) == 1
    assert sorted(reproduce.runs) == ["gptq", "rtn"]
    rows = [row for row in page.read_text().splitlines() if row.startswith("|")]
    assert [row.split("|")[8].strip() for row in rows[2:]] == ["OUT", "within", "within"]
    assert "3 numbers: 2 within, 1 OUT" in capsys.readouterr().out
    assert (suite / "golden.json").read_bytes() == before


def test_cells_run_in_processes_of_their_own(reproduce, suite, tmp_path):
    assert reproduce("--only", "rtn", "--update-golden", execute=execute) == 0
    metrics = json.loads((tmp_path / "work" / "rtn" / "run" / "metrics.json").read_text())
    assert metrics["config"]["base"]["threads"] == 1
    golden = json.loads((suite / "golden.json").read_text())["rtn/fake_quant/text"]["value"]
    assert golden in {one["value"] for one in metrics["evaluation"]}
    assert "EVAL: ppl on text is" in (tmp_path / "work" / "rtn" / "log").read_text()


def test_another_configuration_is_run_again(reproduce, suite):
    assert reproduce("--only", "rtn", "--update-golden") == 0
    (suite / "suite.toml").write_text(SUITE.replace("base.threads=1", "quant.weight.bit=8"))
    assert reproduce("--only", "rtn", "--resume") == 1
    assert reproduce.runs == ["rtn", "rtn"]


def test_an_interrupted_cell_goes_on_where_it_was(reproduce, tmp_path):
    given = []

    def killed(config, overrides, log):
        given.append(next(one for one in overrides if "on_existing" in one))
        (tmp_path / "work" / "rtn" / "run").mkdir(exist_ok=True)
        log.write_text("Killed\n")
        return 137

    assert reproduce("--only", "rtn", "--resume", execute=killed) == 1
    assert reproduce("--only", "rtn", "--resume", execute=killed) == 1
    assert reproduce("--only", "rtn", execute=killed) == 1
    assert given == ["save.on_existing=overwrite", "save.on_existing=resume", "save.on_existing=overwrite"]


def test_a_run_that_fails_is_shown_and_is_red(reproduce, capsys):
    def failing(config, overrides, log):
        log.write_text("first\n" * 20 + "error: it broke\n")
        return 2

    assert reproduce("--jobs", "2", execute=failing) == 1
    out, err = capsys.readouterr()
    assert "3 numbers: 3 FAILED" in out
    assert "exit status 2" in err and "error: it broke" in err


def test_what_is_missing_is_said_once_and_is_green(reproduce, tmp_path, capsys):
    assert reproduce("--models", str(tmp_path), "--data", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "3 numbers: 3 not run" in out
    assert f"missing: model smollm2-135m: no smollm2-135m in {tmp_path}; python scripts/demo_model.py" in out
    assert f"missing: text alice.txt: not in {tmp_path} [2 cells]" in out
    assert reproduce.runs == []


def test_the_list_runs_nothing(reproduce, tmp_path, capsys):
    assert reproduce("--list", "--data", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("gptq  smollm2-135m  ")
    assert f"    missing: text alice.txt: not in {tmp_path}" in out
    assert reproduce.runs == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('id = "rtn"', 'id = "gptq"', "cell gptq stands there twice"),
        ("rtn.yml", "nothing.yml", "cell rtn: there is no file nothing.yml"),
        ("smollm2-135m", "gpt-5", "there is no model gpt-5"),
        ("golden = true, tolerance = 0.05", 'published = "x", tolerance = 0.05', "no published row has the id x"),
        ("golden = true, tolerance = 0.05", "tolerance = 0.05", "either golden = true or the id"),
        ("tolerance = 0.05", "tolerance = 1.5", "tolerance: Input should be less than 1"),
        ("config =", "confg =", "confg: Extra inputs"),
        ("title =", "title", "not valid TOML"),
        ("base.threads=1", "base.thread=1", "(?s)cell gptq: .*thread"),
    ],
)
def test_a_bad_suite_is_one_message_and_code_2(reproduce, suite, capsys, before, after, message):
    (suite / "suite.toml").write_text(SUITE.replace(before, after))
    assert reproduce() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error)
    assert reproduce.runs == []


def test_names_that_do_not_exist_are_answered_with_those_that_do(reproduce, capsys):
    assert reproduce("--only", "awq*") == 2
    assert "it has gptq, rtn" in capsys.readouterr().err
    assert main(["--suite", "medium"]) == 2
    assert "known are llama2, llama31, small, tiny" in capsys.readouterr().err
