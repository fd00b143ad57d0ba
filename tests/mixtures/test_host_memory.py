"""Experts that stay in the host's memory are where the tokens are whenever somebody computes with them, a few at a
time."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import words, write_tokenizer
from families import CONFIGS
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

import llmc
from llmc import opening, prepare
from llmc.algorithms import options_types
from llmc.budget.sensing import sensitivity
from llmc.config import load_config
from llmc.errors import ConfigError
from llmc.models.experts import HostMemory
from llmc.room import check_learning, learning_bytes
from llmc.stream import visits

GROUPS = {"granularity": "per_group", "group_size": 32}
INT4 = {"bit": 4, "symmetric": False, **GROUPS}
INT8 = {"bit": 8, "symmetric": True, "granularity": "per_token"}


class Cipher(HostMemory):
    """Stands for another device: what is stored can't be computed with until it's fetched. Knows how many bytes were
    fetched at a time."""

    room = False

    def __init__(self, device: torch.device) -> None:
        self.stored: dict[int, Tensor] = {}  # their addresses stay their own
        self._fetched: list[tuple[StorageWeakRef, int]] = []
        self.peak = self.fetches = 0
        _EVERY.append(self)

    def holds(self, weight: Tensor) -> bool:
        return weight.data_ptr() in self.stored

    def fetch(self, weight: Tensor) -> Tensor:
        fetched = _flipped(weight)
        self.fetches += 1
        self._fetched = [pair for pair in self._fetched if not pair[0].expired()]
        self._fetched.append((StorageWeakRef(fetched.untyped_storage()), fetched.nbytes))
        self.peak = max(self.peak, sum(size for _, size in self._fetched))
        return fetched

    def store(self, weight: Tensor) -> Tensor:
        kept = _flipped(weight)
        self.stored[kept.data_ptr()] = kept
        return kept

    def has_room_for(self, size: int) -> bool:
        return self.room


_EVERY: list[Cipher] = []


def _flipped(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int32).bitwise_not().view(weight.dtype)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen2-moe"], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "calib.txt").write_text(words(500, seed=1))
    (folder / "eval.txt").write_text(words(80, seed=2))
    return folder


@pytest.fixture
def elsewhere(monkeypatch):
    """Experts stay in the host's memory from here on, and are worked on one by one."""
    _EVERY.clear()
    monkeypatch.setattr(visits, "_TOGETHER", 1)
    monkeypatch.setattr(opening, "experts_on_host", lambda *_: True)
    monkeypatch.setattr(opening, "HostMemory", Cipher)


def settings(source: Path, target: Path, **quant: Any) -> dict[str, Any]:
    content = yaml.safe_load(
        f"""
        model: {{path: '{source}', torch_dtype: float32}}
        calib: {{name: custom_txt, path: '{source}/calib.txt', n_samples: 4, seq_len: 24, preproc: random_truncate_txt}}
        eval: {{eval_pos: [fake_quant], name: custom_ppl, path: '{source}/eval.txt', seq_len: 24}}
        save: {{save_fake: true, save_path: '{target}'}}
        """
    )
    pruner = quant.pop("sparse", None)
    if pruner is not None:
        content["sparse"] = {"method": pruner, "weight": {"sparsity": 0.5}}
    return json.loads(json.dumps(content | {"quant": {"weight": INT4, **quant}}))


RECIPES: dict[str, dict[str, Any]] = {
    "RTN NVFP4": {"method": "RTN", "weight": {"bit": "nvfp4"}},
    "Awq v1": {"method": "Awq", "special": {"trans_version": "v1"}},
    "Awq+GPTQ W4A8": {"method": ["Awq", "GPTQ"], "act": INT8},
    "SmoothQuant": {"method": "SmoothQuant", "act": INT8, "special": {"alpha": "auto"}},
    "OsPlus": {"method": "OsPlus", "act": INT8},
    "Quarot": {"method": "Quarot"},
    "Wanda+GPTQ": {"method": "GPTQ", "sparse": "Wanda"},
    "SparseGPT+RTN": {"method": "RTN", "sparse": "SparseGPT"},
}


def expert_bytes(source: Path) -> int:
    """Of one expert's weights in float32."""
    config = CONFIGS["qwen2-moe"]
    return 4 * 3 * config.hidden_size * config.moe_intermediate_size


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_results_are_the_same_with_one_expert_at_a_time(recipe, source, tmp_path, request):
    here = llmc.compress(settings(source, tmp_path / "here", **RECIPES[recipe]))
    request.getfixturevalue("elsewhere")
    there = llmc.compress(settings(source, tmp_path / "there", **RECIPES[recipe]))
    assert here.perplexities[0].value == there.perplexities[0].value
    files = [sorted((tmp_path / name).glob("*/*.safetensors")) for name in ("here", "there")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]] != []
    (memory,) = _EVERY
    assert 0 < memory.peak <= expert_bytes(source)


def test_a_search_brings_all_experts_where_there_is_room(source, tmp_path, monkeypatch, elsewhere):
    """They change their place once for a search, not once for each candidate."""
    results = []
    for room in (False, True):
        monkeypatch.setattr(Cipher, "room", room)
        results.append(llmc.compress(settings(source, tmp_path / str(room), method="Awq")).perplexities[0].value)
    assert results[0] == results[1]
    few, many = _EVERY
    assert few.peak == expert_bytes(source) < many.peak and many.fetches < few.fetches / 2


def test_a_method_that_learns_has_the_whole_block(source, tmp_path, request):
    learning = {"method": "OmniQuant", "special": {"epochs": 1, "let": True}}
    here = llmc.compress(settings(source, tmp_path / "here", **learning))
    request.getfixturevalue("elsewhere")
    there = llmc.compress(settings(source, tmp_path / "there", **learning))
    assert here.perplexities[0].value == there.perplexities[0].value
    assert _EVERY[0].peak == CONFIGS["qwen2-moe"].num_experts * expert_bytes(source)


def test_gradients_go_through_experts_that_visit(source, tmp_path, request):
    content = settings(source, tmp_path / "here", method="RTN")
    here, _ = sensitivity(load_config(content, (), options_types()), print)
    request.getfixturevalue("elsewhere")
    there, _ = sensitivity(load_config(content, (), options_types()), print)
    assert [layer.importance for layer in here.layers] == [layer.importance for layer in there.layers]
    assert here == there
    assert 0 < _EVERY[0].peak <= expert_bytes(source)


@pytest.mark.parametrize(("dtype", "each", "rounded"), [("float32", 4, 4), ("bfloat16", 2 + 4 + 2, 4)])
def test_what_learning_takes_at_least(source, tmp_path, dtype, each, rounded):
    """A linear layer that is left alone isn't tried; the router, the norms and the shared expert's gate never are."""
    content = settings(source, tmp_path / "out", method="OmniQuant")
    content["model"]["torch_dtype"] = dtype
    content["ignored_layers"] = {"layer_names": ["o_proj"]}
    prepared = prepare.prepare(load_config(content, (), options_types()))
    blocks = [dict(block.named_parameters()) for block in prepared.skeleton.blocks]
    plain = ("o_proj.weight", "mlp.gate.weight", "norm.weight", "shared_expert_gate.weight", ".bias")
    expected = max(
        sum(one.numel() * (each + rounded * (not name.endswith(plain))) for name, one in block.items())
        for block in blocks
    )
    assert learning_bytes(prepared.recipe, prepared.skeleton, prepared.subsets) == expected


@pytest.mark.parametrize(("free", "fits"), [(10**12, True), (10**3, False)])
def test_learning_a_block_that_does_not_fit_is_refused(source, tmp_path, monkeypatch, free, fits):
    prepared = prepare.prepare(load_config(settings(source, tmp_path / "out", method="OmniQuant"), (), options_types()))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    ask = partial(check_learning, prepared.recipe, prepared.skeleton, prepared.subsets, torch.device("cuda"))
    if fits:
        ask()
        return
    with pytest.raises(
        ConfigError, match=r"quant\.method: OmniQuant learns a block as a whole.* GB of the device are free"
    ):
        ask()
