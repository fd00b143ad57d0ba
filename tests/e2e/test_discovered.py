"""Runs on architectures that nobody declared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, reload, write_tokenizer
from transformers import AutoModelForCausalLM, PhiConfig

from llmc.config import load_config
from llmc.errors import ModelError
from llmc.models import registry
from llmc.prepare import prepare

METHODS: dict[str, Any] = {
    "RTN": "RTN",
    "GPTQ": "GPTQ",
    "AWQ": "Awq",
    "SmoothQuant": ["SmoothQuant", "RTN"],
}


@pytest.fixture
def undeclared(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes all adapters away."""
    return lambda: monkeypatch.setattr(registry, "ADAPTERS", ())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_discovery_compresses_to_the_bytes_that_the_adapter_gives(
    name: str,
    method: str,
    source_of: Callable[[str], Path],
    case: Callable[..., Case],
    undeclared: Callable[[], None],
) -> None:
    def run() -> dict[str, str]:
        made = case(source_of(name), METHODS[method], save={"save_fake": False})
        result = made.compress()
        adapters.append(result.metrics["model"]["adapter"])
        return made.written()

    adapters: list[str] = []
    expected = run()
    undeclared()
    assert run() == expected and any(file.endswith(".safetensors") for file in expected)
    assert adapters == [{"llama": "Llama", "opt": "Opt"}[name], "Discovered"]


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention and feed-forward behind one norm; no adapter declares it."""
    folder = tmp_path_factory.mktemp("phi")
    config = PhiConfig(
        vocab_size=208, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_a_family_that_nobody_declared_is_smoothed_and_rounded(
    phi: Path, case: Callable[..., Case], undeclared: Callable[[], None]
) -> None:
    undeclared()
    made = case(phi, ["SmoothQuant", "GPTQ"], eval={"eval_pos": ["pretrain", "transformed", "fake_quant"]})
    result = made.compress()
    by_position = {one.position: one.value for one in result.perplexities}
    assert by_position["transformed"] == pytest.approx(by_position["pretrain"], rel=1e-5)
    together = "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj+mlp.fc1"
    assert [list(row["scales"]) for row in result.metrics["blocks"]] == [[together]] * 2
    fake = reload(made.save_path / "fake_quant_model")
    assert all(parameter.isfinite().all() for parameter in fake.parameters())


def test_a_run_says_that_it_was_discovery(phi: Path, case: Callable[..., Case], undeclared: Callable[[], None]) -> None:
    undeclared()
    prepared = prepare(load_config(case(phi).content, [], {}))
    assert any("'phi'" in warning and "llmc inspect" in warning for warning in prepared.warnings)


def test_a_name_that_is_asked_for_is_not_discovered(
    phi: Path, case: Callable[..., Case], undeclared: Callable[[], None]
) -> None:
    undeclared()
    with pytest.raises(ModelError, match="no adapter for the architecture 'phi'"):
        case(phi, model={"type": "Phi"}).compress()


def test_rotating_what_was_discovered_is_refused(
    phi: Path, case: Callable[..., Case], undeclared: Callable[[], None]
) -> None:
    undeclared()
    with pytest.raises(ModelError, match="doesn't declare who writes and reads the residual"):
        case(phi, ["Quarot", "RTN"]).compress()
