"""``python -m llmc inspect``: what it shows, and what it says of input that isn't a model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.cli import main
from llmc.inspecting import InspectedSubset, inspect_model
from llmc.models import Subset, registry
from llmc.report.inspection import lines_of, numbers, show

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Path]:
    """A folder with nothing but a configuration."""

    def make(model_type: str, **values: Any) -> Path:
        AutoConfig.for_model(model_type, **values).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


def test_a_declared_model_is_shown_and_agrees_with_what_is_found(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny.folder)]) == 0
    shown = capsys.readouterr().out
    found = inspect_model(str(tiny.folder))
    assert "finds what was declared" in shown and "blocks 0-3" in shown and f"{found.parameters:,}" in shown
    linears = [name for subset in tiny.subsets for name in subset.linears]
    assert all(name in shown for name in linears)
    assert found.adapter == tiny.adapter.name and [group.differences for group in found.groups] == [()]
    model = tiny.model()
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    weights = dict(model.get_submodule(tiny.adapter.blocks).named_parameters())
    assert found.compressible == sum(weights[f"{i}.{name}.weight"].numel() for i in range(4) for name in linears)
    assert found.groups[0].parameters == sum(p.numel() for n, p in weights.items() if n.startswith("0."))


def test_what_was_discovered_is_shown_with_what_cannot_be_done(
    config_of: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "ADAPTERS", ())
    assert main(["inspect", str(config_of("bloom", **BLOOM))]) == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert "none declared" in words and "blocks 0-1 (BloomBlock, 12,704 parameters each)" in words
    assert "self_attention.query_key_value 96 x 32 residual > heads input_layernorm self_attention" in words
    assert "rows 16-23, 40-47, ..." in words
    assert "mlp.dense_4h_to_h: nothing can absorb a scale: mlp.dense_h_to_4h: something stands between" in words
    assert "rotation (QuaRot):" in words and "quantized KV cache:" in words
    assert max(map(len, shown.splitlines())) <= 100


def test_the_experts_of_a_mixture_share_a_line(
    config_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    assert main(["inspect", str(config_of("gpt_oss", **TINY, **shape, head_dim=8))]) == 0
    shown = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "finds what was declared" in shown
    assert "mlp.experts.0-3.gate_proj 48 x 32 residual > ffn post_attention_layernorm mlp" in lines
    assert "mlp.experts.0-3.up_proj 48 x 32" in lines and "+ mlp.router kept" in lines
    assert "mlp.experts.0-3.down_proj 32 x 48 ffn > residual - itself" in lines
    assert any(line.startswith("mlp.experts.0-3.down_proj: nothing can absorb a scale") for line in lines)
    assert max(map(len, shown.splitlines())) <= 100


def test_experts_of_other_shapes_have_a_line_of_their_own() -> None:
    names = ("e.0.up", "e.1.up", "e.2.up", "e.3.up", "shared.up")
    subset = InspectedSubset(Subset(names, None, "", experts="e"), ((4, 8), (4, 8), (6, 8), (4, 8), (4, 8)), None)
    assert lines_of(subset) == [("e.0-1,3.up", (4, 8)), ("e.2.up", (6, 8)), ("shared.up", (4, 8))]


def test_a_wrong_declaration_is_noticed(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tiny.adapter

    def subsets(config: Any, block: Any) -> Any:
        first, *others = right.subsets(config, block)
        return (replace(first, prev=None, inspect=""), *others)

    monkeypatch.setattr(registry, "ADAPTERS", (replace(right, subsets=subsets),))
    found = inspect_model(str(tiny.folder))
    first = right.subsets(tiny.config, tiny.skeleton().blocks[0])[0]
    said = [f"inspect declared '', discovered {first.inspect!r}"]
    if first.prev is not None:
        said = [f"prev declared None, discovered {first.prev!r}", *said]
    assert [line.partition(": ")[2] for line in found.groups[0].differences] == said
    output = io.StringIO()
    show(found, Console(file=output, width=100))
    assert f"{len(said)} difference" in output.getvalue() and "DIFFERS" in output.getvalue()


def test_a_split_that_nobody_finds_is_noticed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = llama.adapter

    def subsets(config: Any, block: Any) -> Any:
        first, *others = right.subsets(config, block)
        return (replace(first, linears=first.linears[:2]), replace(first, linears=first.linears[2:]), *others)

    monkeypatch.setattr(registry, "ADAPTERS", (replace(right, subsets=subsets),))
    differences = inspect_model(str(llama.folder)).groups[0].differences
    assert len(differences) == 3 and "discovered, but not declared" in differences[-1]


def test_a_model_that_a_pass_over_blocks_cannot_run_is_shown_with_the_reason(
    config_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config_of(
        "gemma3n_text", **TINY, num_key_value_heads=2, intermediate_size=48, head_dim=8, pad_token_id=0,
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, num_kv_shared_layers=1, laurel_rank=4,
        altup_num_inputs=2, layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    assert main(["inspect", str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "can't be compressed" in shown and "the hidden state has 4 dimensions" in shown


@pytest.mark.parametrize(
    ("model_type", "values", "says"),
    [
        ("t5", {"d_model": 32, "num_layers": 2}, "is an encoder-decoder (t5)"),
        ("vit", {}, "can't make a causal language model of this config.json"),
    ],
)
def test_what_is_no_decoder_is_refused_in_one_message(
    model_type: str,
    values: dict[str, Any],
    says: str,
    config_of: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", str(config_of(model_type, **values))]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("error:") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model_type": "nobody-knows-this"}, "nobody-knows-this"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}, "trust_remote_code"),
    ],
)
def test_an_unknown_configuration_is_refused_in_one_message(
    content: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("error:") == 1


def test_a_folder_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "./nowhere"]) == 2
    assert "no such folder: ./nowhere" in capsys.readouterr().err


REMOTE = """\
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_of_the_model_runs_with_consent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(REMOTE)
    content = {**TINY, "model_type": "mine", "num_key_value_heads": 2, "intermediate_size": 48}
    content["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--trust-remote-code"]) == 0
    assert "model_type mine" in capsys.readouterr().out


def test_no_weight_is_needed(config_of: Callable[..., Path]) -> None:
    folder = config_of("llama", **TINY, intermediate_size=48)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    found = inspect_model(str(folder))
    whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert found.parameters == sum(parameter.numel() for parameter in whole.parameters())


@pytest.mark.parametrize(
    ("blocks", "text"), [([0], "block 0"), ([0, 1, 2], "blocks 0-2"), ([0, 1, 2, 4, 6, 7], "blocks 0-2, 4, 6-7")]
)
def test_numbers_of_blocks_are_ranges(blocks: list[int], text: str) -> None:
    assert numbers(blocks) == text
