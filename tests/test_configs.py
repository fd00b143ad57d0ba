"""Every file under configs/: it parses, and its dry run works on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from llmc.algorithms import options_types
from llmc.config import load_config
from llmc.prepare import prepare

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama whose widths the groups of 64 and 128 divide, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("All in the golden afternoon full leisurely we glide.\n" * 20)
    return file


def small(section, text):
    """Overrides that replace the text of a section, such as calib or eval.0, by a little local one."""
    values = {"name": "text", "path": text, "download": False, "seq_len": 32}
    values |= (
        {"n_samples": 2, "preproc": "sequential", "apply_chat_template": False}
        if section == "calib"
        else {"num_chunks": 2}
    )
    return [f"{section}.{key}={value}" for key, value in values.items()]


def test_there_are_files():
    assert len(FILES) > 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_a_config_parses_without_a_warning_and_its_dry_run_works(file, model, text, tmp_path, monkeypatch):
    # llama.cpp has no pre-tokenizer for a tokenizer of bytes alone.
    monkeypatch.setattr("llmc.export.gguf_tokenizer._pre_tokenizer", lambda file, tokenizer: "default")
    assert load_config(file, methods=options_types()).warnings == ()
    sections = yaml.safe_load(file.read_text())
    overrides = [f"model.path={model}", f"save.save_path={tmp_path / 'out'}", "base.device=cpu"]
    listed = isinstance(sections["eval"], list)
    evals = [f"eval.{index}" for index in range(len(sections["eval"]))] if listed else ["eval"]
    for section in ["calib"] * ("calib" in sections) + evals:
        overrides += small(section, text)
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
