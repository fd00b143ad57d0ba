"""Every file under configs/: it parses, and its dry run works on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from dry import small
from tiny import write_byte_model

from llmc.algorithms import options_types
from llmc.config import load_config
from llmc.prepare import prepare

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(file for file in CONFIGS.rglob("*.yml") if "reproduce" not in file.parts)  # those: tests/reproduction


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama whose widths the groups of 64 and 128 divide, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_byte_model(folder)
    return folder


def test_there_are_files():
    assert len(FILES) > 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_a_config_parses_without_a_warning_and_its_dry_run_works(file, model, little_text, tmp_path, monkeypatch):
    # llama.cpp has no pre-tokenizer for a tokenizer of bytes alone.
    monkeypatch.setattr("llmc.export.gguf_tokenizer._pre_tokenizer", lambda file, tokenizer: "default")
    assert load_config(file, methods=options_types()).warnings == ()
    sections = yaml.safe_load(file.read_text())
    overrides = [f"model.path={model}", f"save.save_path={tmp_path / 'out'}", "base.device=cpu"]
    listed = isinstance(sections["eval"], list)
    evals = [f"eval.{index}" for index in range(len(sections["eval"]))] if listed else ["eval"]
    for section in ["calib"] * ("calib" in sections) + evals:
        overrides += small(section, little_text)
    overrides += [f"{section}.num_eval_tokens=16" for section in evals if listed]
    shorter = sections.get("sparse", {}).get("method") == "ShortGPT"
    overrides += ["sparse.weight.n_prune_layers=1"] * shorter
    quant = sections.get("quant", {})
    overrides += ["quant.vision=null"] * ("vision" in quant)  # this model reads text; tests/vision has the others
    prepared = prepare(load_config(file, overrides, options_types()))
    assert {layer.spec is not None for layer in prepared.layers} == {"weight" in quant.get("language", quant)}
    assert {layer.sparsity is not None for layer in prepared.layers} == {"sparse" in sections and not shorter}
    assert prepared.recipe.drop_blocks == shorter
    assert (prepared.recipe.kv is not None) == ("kvcache" in sections.get("quant", {}))
    assert len(prepared.layers) == 2 * 7
    assert {exporter.name for exporter in prepared.exporters} == {
        key for key, value in sections["save"].items() if value is True
    }
    assert bool(prepared.calib) == ("calib" in sections)
    assert [one.positions for one in prepared.evaluations] == [("pretrain", "fake_quant")] * len(evals)
    assert not (tmp_path / "out").exists()
