"""The worked examples of docs/adding.md: their files are made, their changes applied, their commands run."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from pages import ROOT, Block, blocks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PAGE = ROOT / "docs" / "adding.md"
# All commands in one process: importing torch takes longer than everything that they do.
DRIVER = """
import json, pathlib, runpy, sys
import llmc.cli
assert pathlib.Path(llmc.__file__).is_relative_to(pathlib.Path.cwd()), llmc.__file__
for program, *arguments in json.loads(sys.argv[1]):
    if program == "python":
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        assert program == "llmc" and llmc.cli.main(arguments) == 0
"""


def apply(block: Block, folder):
    """Change a file as a diff says whose context stands in it exactly once."""
    file = folder / block.title
    lines = block.text.splitlines()
    before = "\n".join(line[1:] for line in lines if line[0] in " -") + "\n"
    after = "\n".join(line[1:] for line in lines if line[0] in " +") + "\n"
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{block}: {block.title} doesn't hold these lines (once)"
    file.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A copy of the package with all that the page adds, after its commands; and what they printed."""
    folder = tmp_path_factory.mktemp("adding")
    shutil.copytree(ROOT / "llmc", folder / "llmc", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "configs").symlink_to(ROOT / "configs")
    for block in blocks("python", "yaml", "diff", page=PAGE):
        if block.language == "diff":
            apply(block, folder)
        elif block.title:
            assert not (folder / block.title).exists()
            (folder / block.title).write_text(block.text, encoding="utf-8")
    commands = [command for block in blocks("bash", page=PAGE) for command in block.commands]
    assert len(commands) == 5
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder, ran.stdout


def original(folder):
    return load_file(folder / "tiny-model" / "model.safetensors")


def test_the_model_is_declared_and_its_perplexity_that_of_transformers(done):
    folder, printed = done
    assert "SeedOss" in printed and "finds what was declared" in printed
    metrics = json.loads((folder / "outputs" / "tiny_model" / "metrics.json").read_text())
    measured = {one["position"]: one["value"] for one in metrics["evaluation"]}
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny-model", dtype=torch.float32)
    tokenizer = json.loads((folder / "tiny-model" / "tokenizer.json").read_text())["model"]["vocab"]
    text = (folder / "tiny.txt").read_text(encoding="utf-8").replace("\n", "Ċ").replace(" ", "Ġ")
    windows = torch.tensor([tokenizer[sign] for sign in text[: 4 * 64]]).reshape(4, 64)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss for window in windows]
    assert measured["pretrain"] == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert measured["fake_quant"] != measured["pretrain"]


def test_the_method_rounds_in_the_ranges_that_its_option_asks_for(done):
    folder, _ = done
    written = load_file(folder / "outputs" / "tiny_method" / "fake_quant_model" / "model-00002-of-00004.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weight = original(folder)[name].double()
    scale = 0.8 * weight.abs().amax(1, keepdim=True) / 7
    expected = (weight / scale).round().clamp(-8, 7) * scale
    assert torch.allclose(written[name].double(), expected, rtol=0, atol=1e-6)


def test_the_format_holds_the_codes(done):
    folder, _ = done
    stored = {}
    for shard in (folder / "outputs" / "tiny_format" / "codes_quant_model").glob("*.safetensors"):
        stored |= load_file(shard)
    name = "model.layers.1.self_attn.k_proj"
    runs = original(folder)[f"{name}.weight"].reshape(32, 2, 32)
    scale = (runs.abs().amax(-1) / 7).half()
    assert torch.equal(stored[f"{name}.scales"], scale)
    assert torch.equal(
        stored[f"{name}.codes"], (runs / scale[..., None].float()).round().to(torch.int8).reshape(32, 64)
    )
    assert f"{name}.weight" not in stored and stored[f"{name}.codes"].dtype == torch.int8
