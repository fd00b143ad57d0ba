"""Runs with a quantized KV cache, against Transformers' own decoding with a cache that quantizes what it gives out."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import WINDOW, WINDOWS, Case, reload
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache

from llmc.cli import main
from llmc.quant import IntGrid
from llmc.quant.kv import on_grid

VLLM, FAKE = "vllm_quant_model", "fake_quant_model"
KIVI = {
    "method": "Kivi",
    "bit": 2,
    "symmetric": False,
    "granularity": "per_group",
    "group_size": 8,
    "residual_length": 8,
}
NAIVE = {"method": "Naive", "bit": 2, "symmetric": False, "granularity": "per_token"}
FP8 = {"method": "Naive", "bit": "e4m3", "symmetric": True, "granularity": "per_tensor", "static": True}
BOTH = ["pretrain", "fake_quant", "fake_quant_wo_kv"]


class Kivi(DynamicCache):
    """Keeps all keys and values as they come, and gives out what KIVI's cache would at this moment."""

    grid = IntGrid(2, symmetric=False, offset=True)

    def update(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        keys, values = (states.clone() for states in super().update(*args, **options))
        before = keys.shape[2] - 1
        for start in range(0, before // 8 * 8, 8):
            keys[:, :, start : start + 8] = on_grid(keys[:, :, start : start + 8].mT, self.grid).mT
        for at in range(max(0, before - 8)):
            for group in range(0, values.shape[3], 8):
                part = values[:, :, at, group : group + 8]
                values[:, :, at, group : group + 8] = on_grid(part, self.grid)
        return keys, values


class Naive(DynamicCache):
    """Gives out every token of every head on a grid of its own."""

    grid = IntGrid(2, symmetric=False)

    def update(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **options)
        return on_grid(keys, self.grid), on_grid(values, self.grid)


class Static(DynamicCache):
    """Gives out one layer's states in FP8 with the scales given, the others' as they are."""

    def __init__(self, layer: int, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.layer, self.scales = layer, (key, value)

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        states = super().update(key, value, layer, *args, **options)
        if layer != self.layer:
            return states
        codes = [
            (s / scale).clamp(-448, 448).to(torch.float8_e4m3fn) for s, scale in zip(states, self.scales, strict=True)
        ]
        return codes[0].float() * self.scales[0], codes[1].float() * self.scales[1]


def tokens_of(case: Case, section: str, count: int, length: int) -> Tensor:
    content = case.content[section]
    text = Path((content[0] if isinstance(content, list) else content)["path"]).read_text()
    ids = AutoTokenizer.from_pretrained(case.source)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def decoded(folder: Path, windows: Tensor, make: type[DynamicCache]) -> float:
    """Perplexity of the whole model, a token at a time."""
    model, losses = reload(folder), []
    for window in windows:
        cache = make()
        logits = [model(input_ids=token[None, None], past_key_values=cache).logits[0, 0] for token in window]
        losses.append(nn.functional.cross_entropy(torch.stack(logits[:-1]), window[1:]))
    return exp(float(torch.stack(losses).double().mean()))


def measured(result: Any) -> dict[tuple[str, str], float]:
    return {(one.kind, one.position): one.value for one in result.perplexities}


def both_ways(case: Case, positions: list[str]) -> Case:
    """Evaluate by prefill and by decoding."""
    prefill = {**case.content["eval"], "eval_pos": positions}
    case.content["eval"] = [prefill, {**prefill, "type": "decode_ppl"}]
    return case


@pytest.mark.parametrize(("cache", "oracle"), [(KIVI, Kivi), (NAIVE, Naive)], ids=["kivi", "naive"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_both_perplexities_are_those_of_transformers_decoding_with_such_a_cache(case, source_of, family, cache, oracle):
    run = both_ways(case(source_of(family), quant={"kvcache": cache}, save={"save_vllm": False}), BOTH)
    found, windows = measured(run.compress()), tokens_of(run, "eval", WINDOWS, WINDOW)
    expected = decoded(run.save_path / FAKE, windows, oracle)
    assert found["decode_ppl", "fake_quant"] == pytest.approx(expected, rel=1e-4)
    assert found["ppl", "fake_quant"] == pytest.approx(expected, rel=1e-4)
    assert found["decode_ppl", "pretrain"] == pytest.approx(decoded(run.source, windows, DynamicCache), rel=1e-4)
    assert found["ppl", "pretrain"] == pytest.approx(found["decode_ppl", "pretrain"], rel=1e-4)
    without = decoded(run.save_path / FAKE, windows, DynamicCache)
    assert found["decode_ppl", "fake_quant_wo_kv"] == pytest.approx(without, rel=1e-4)
    assert found["ppl", "fake_quant_wo_kv"] == pytest.approx(without, rel=1e-4)
    assert expected != pytest.approx(without, rel=1e-3)


def test_the_cache_alone_is_quantized_and_the_weights_stay(case):
    run = both_ways(case(quant={"kvcache": KIVI, "weight": None}, save={"save_vllm": False}), BOTH)
    result = run.compress()
    found, windows = measured(result), tokens_of(run, "eval", WINDOWS, WINDOW)
    assert found["decode_ppl", "fake_quant"] == pytest.approx(decoded(run.source, windows, Kivi), rel=1e-4)
    assert found["ppl", "fake_quant_wo_kv"] == found["ppl", "pretrain"]
    assert found["ppl", "fake_quant"] != pytest.approx(found["ppl", "pretrain"], rel=1e-3)
    original, written = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (run.source, run.save_path / FAKE)
    )
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)
    assert result.metrics["bits_per_weight"] is None
    assert result.metrics["kv_scheme"]["bits_per_element"] == 2 + 32 / 8


def test_static_scales_are_calibrated_on_what_the_compressed_model_feeds_its_cache(case):
    run = case(quant={"kvcache": FP8})
    run.compress()
    folder = run.save_path / VLLM
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    scales = [[stored[f"model.layers.{i}.self_attn.{part}_scale"] for part in "kv"] for i in range(4)]
    assert {(tuple(scale.shape), scale.dtype) for pair in scales for scale in pair} == {((1,), torch.float32)}
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert {key: scheme[key] for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")} == {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "dynamic": False,
        "symmetric": True,
    }
    model, fake = reload(run.source), reload(run.save_path / FAKE)
    windows = tokens_of(run, "calib", 4, 16)
    for layer in range(2):  # the second one's inputs come from the first as it was written, with its cache
        caches = [Static(0, *scales[0]) if layer else DynamicCache() for _ in windows]
        for window, cache in zip(windows, caches, strict=True):
            model(input_ids=window[None], past_key_values=cache)
        for found, states in zip(scales[layer], ("keys", "values"), strict=True):
            largest = max(float(getattr(cache.layers[layer], states).abs().max()) for cache in caches)
            assert found.item() == pytest.approx(largest / 448, rel=1e-6)
        model.model.layers[0].load_state_dict(fake.model.layers[0].state_dict())


def test_a_folder_for_vllm_with_nothing_but_cache_scales(case):
    run = case(quant={"kvcache": FP8, "weight": None})
    run.compress()
    quantization = json.loads((run.save_path / VLLM / "config.json").read_text())["quantization_config"]
    assert quantization["config_groups"] == {}
    assert quantization["kv_cache_scheme"]["num_bits"] == 8
    names = {name for file in (run.save_path / VLLM).glob("*.safetensors") for name in load_file(file)}
    plain = {name for file in run.source.glob("*.safetensors") for name in load_file(file)}
    assert names - plain == {f"model.layers.{i}.self_attn.{part}_scale" for i in range(4) for part in "kv"}


def test_the_calibration_of_later_weights_sees_the_quantized_cache(case):
    plain, quantized = (case(method="GPTQ", save={"save_vllm": False}, eval={"eval_pos": []}) for _ in range(2))
    quantized.content["quant"]["kvcache"] = KIVI
    plain.compress()
    quantized.compress()
    weights = [load_file(next((run.save_path / FAKE).glob("*-00002-of-*"))) for run in (plain, quantized)]
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert {name.removeprefix("model.layers.0.") for name in changed} == {
        f"{linear}.weight" for linear in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }  # q, k and v come before the cache


def test_decoding_can_be_shortened(case, capsys):
    run = case()
    limits = {"type": "decode_ppl", "num_samples": 2, "num_eval_tokens": 7, "eval_pos": ["pretrain"]}
    run.content["eval"] = [{**run.content["eval"], **limits}, {**run.content["eval"], **limits, "seq_len": None}]
    assert main(run.arguments) == 0
    metrics = json.loads((run.save_path / "metrics.json").read_text())
    first, packed = metrics["evaluation"]
    assert [(one["windows"], one["seq_len"], one["kind"]) for one in (first, packed)] == [(2, 7, "decode_ppl")] * 2
    windows = tokens_of(run, "eval", 2, WINDOW)[:, :7]
    assert first["value"] == pytest.approx(decoded(run.source, windows, DynamicCache), rel=1e-4)
    assert packed["value"] == pytest.approx(decoded(run.source, tokens_of(run, "eval", 2, 7), DynamicCache), rel=1e-4)
    shown = capsys.readouterr().out
    assert f"EVAL: decode_ppl on text is {first['value']:.4f}" in shown
    assert "2 windows of 24 (their first 7 tokens)" in shown
