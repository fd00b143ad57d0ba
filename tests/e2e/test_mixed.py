"""Whole runs in which layers have schemes of their own: each layer gets its own, and backends read them apart."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from math import exp

import pytest
import torch
from cases import files_of, reload
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from test_pipeline import FAKE, VLLM, evaluation_windows, perplexities, same_logits, tensors_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import llmc
from llmc.cli import main
from llmc.run import Silent

W8 = {"bit": 8, "symmetric": True, "granularity": "per_channel"}
A8 = {"bit": 8, "symmetric": True, "granularity": "per_token"}
STATIC = {"bit": 8, "symmetric": True, "granularity": "per_tensor", "static": True}
G64 = {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 64}
EXACT = {"symmetric": True, "scale_dtype": "float32"}
DOWN8 = {"down": {"layer_name": ["down_proj"], "weight": W8, "act": A8}}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVERAL = {
    "kept": {"layer_name": ["down_proj#0-3"], "do_quant": False},
    "wide": {"layer_name": ["down_proj"], "weight": W8},
    "grouped": {"layer_name": [f"{name}#1..2" for name in ATTENTION], "weight": G64},
}


def mixed(settings):
    return {"mix_bits": settings}


def round_tokens(inputs: Tensor) -> Tensor:
    """int8 per token, written down anew."""
    scale = (inputs.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (inputs / scale).round().clamp(-128, 127) * scale


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    logits = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in windows]
    losses = [nn.functional.cross_entropy(y[:-1], ids[1:]) for y, ids in zip(logits, windows, strict=True)]
    return exp(float(torch.stack(losses).double().mean()))


def rounding_inputs(model: nn.Module, pattern: str) -> nn.Module:
    found = [module for name, module in model.named_modules() if fnmatchcase(name, pattern)]
    assert found
    for module in found:
        module.register_forward_pre_hook(lambda module, args: (round_tokens(args[0]),))
    return model


def theirs(folder) -> nn.Module:
    """As Transformers loads it. Its ``dequantize=True`` knows one group only; this way it knows no zero points, and has
    scales in float32, so that products of narrower ones aren't rounded as in vLLM."""
    plain = CompressedTensorsConfig()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=plain).eval()


def same_dense_weights(run) -> bool:
    """Whether compressed-tensors decompresses each weight, by the group that names it, to the evaluated one."""
    stored, fake = tensors_of(run.save_path / VLLM), tensors_of(run.save_path / FAKE)
    content = json.loads((run.save_path / VLLM / "config.json").read_text())["quantization_config"]
    for group in QuantizationConfig.model_validate(content).config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(group.format)
        for name in group.targets:
            own = {key.removeprefix(f"{name}."): part for key, part in stored.items() if key.startswith(f"{name}.")}
            dense = compressor.decompress(own, group)["weight"]
            if not torch.equal(dense.float(), fake[f"{name}.weight"].float()):
                return False
    return True


@pytest.mark.parametrize("method", ["RTN", "GPTQ", "Awq"])
def test_w4_with_w8a8_for_down_is_evaluated_as_it_is_written(case, method):
    run = case(method=method, quant=mixed(DOWN8))
    measured, windows = perplexities(run.compress())["fake_quant"], evaluation_windows(run)
    assert same_dense_weights(run)
    own = rounding_inputs(reload(run.save_path / FAKE), "*.down_proj")
    assert measured == pytest.approx(perplexity(own, windows), rel=1e-5)
    assert measured != pytest.approx(perplexity(reload(run.save_path / FAKE), windows), rel=2e-5)


def test_every_layer_has_its_own_scheme_in_groups_that_do_not_overlap(case):
    run = case(method="GPTQ", quant=mixed(SEVERAL), eval={"eval_pos": []})
    run.compress()
    assert same_dense_weights(run)
    stored, original = tensors_of(run.save_path / VLLM), tensors_of(run.source)
    expected = {}
    for block in range(4):
        for name in (*(f"self_attn.{name}" for name in ATTENTION), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            scheme = (4, 64) if name.startswith("self_attn") and block in (1, 2) else (4, 32)
            scheme = (8, None) if name == "mlp.down_proj" else scheme
            expected[f"model.layers.{block}.{name}"] = scheme
    kept = {f"model.layers.{block}.mlp.down_proj" for block in (0, 3)}
    for name, (bits, group) in expected.items():
        weight = original[f"{name}.weight"]
        if name in kept:
            assert torch.equal(stored[f"{name}.weight"], weight)
            continue
        assert stored[f"{name}.weight_packed"].shape[1] == weight.shape[1] * bits // 32
        assert stored[f"{name}.weight_scale"].shape[1] == weight.shape[1] // (group or weight.shape[1])
    content = json.loads((run.save_path / VLLM / "config.json").read_text())["quantization_config"]
    loaded = QuantizationConfig.model_validate(content)
    groups = loaded.config_groups.values()
    targets = [target for group in groups for target in group.targets]
    assert sorted(targets) == sorted(expected.keys() - kept)  # each exactly once
    assert kept <= set(loaded.ignore)
    for group in groups:
        assert {expected[name] for name in group.targets} == {(group.weights.num_bits, group.weights.group_size)}
    assert loaded.format == "pack-quantized"


def test_transformers_and_compressed_tensors_run_w4_with_w8a8_for_down_alike(case):
    down = {"layer_name": ["down_proj"], "weight": W8, "act": {**A8, "symmetric": False}}
    run = case(method="GPTQ", quant={"weight": {**G64, **EXACT}, **mixed({"down": down})})
    measured, windows = perplexities(run.compress())["fake_quant"], evaluation_windows(run)
    assert measured == pytest.approx(perplexity(theirs(run.save_path / VLLM), windows), rel=1e-4)
    assert measured != pytest.approx(perplexity(reload(run.save_path / FAKE), windows), rel=2e-4)


@torch.no_grad()
def test_transformers_computes_the_evaluated_logits_of_several_groups(case):
    weights = [{**G64, **EXACT, "bit": bit} for bit in (4, 8)]
    settings = {"down": {"layer_name": ["down_proj#1..3", "o_proj#0"], "weight": weights[1]}}
    run = case(quant={"weight": weights[0], **mixed(settings)}, eval={"eval_pos": []})
    run.compress()
    windows = evaluation_windows(run)
    found, fake = theirs(run.save_path / VLLM), reload(run.save_path / FAKE)
    assert torch.equal(found(input_ids=windows).logits, fake(input_ids=windows).logits)
    original = reload(run.source)
    assert not torch.allclose(original(input_ids=windows).logits, fake(input_ids=windows).logits, rtol=1e-3)


def test_groups_of_different_formats_say_so(case):
    run = case(quant=mixed(DOWN8), eval={"eval_pos": []})
    run.compress()
    content = json.loads((run.save_path / VLLM / "config.json").read_text())["quantization_config"]
    assert content["format"] == "mixed-precision"
    assert {group["format"] for group in content["config_groups"].values()} == {"pack-quantized", "int-quantized"}


def test_only_the_linears_that_round_their_input_get_it_rounded(case):
    settings = {"query": {"layer_name": ["q_proj"], "weight": W8, "act": A8}}
    run = case(method="Awq", quant=mixed(settings), save={"save_vllm": False})
    measured, windows = perplexities(run.compress())["fake_quant"], evaluation_windows(run)
    own = rounding_inputs(reload(run.save_path / FAKE), "*.q_proj")
    assert measured == pytest.approx(perplexity(own, windows), rel=1e-5)
    assert measured != pytest.approx(perplexity(reload(run.save_path / FAKE), windows), rel=1e-5)


def test_only_named_layers_are_quantized_where_nothing_is_said_of_the_others(case):
    run = case(quant={"weight": None, **mixed({"down": {"layer_name": ["down_proj"], "weight": G64}})})
    run.compress()
    assert same_logits(run, VLLM, FAKE)  # one group
    original, written = tensors_of(run.source), tensors_of(run.save_path / VLLM)
    assert {name for name in original if name not in written} == {
        f"model.layers.{block}.mlp.down_proj.weight" for block in range(4)
    }


@pytest.mark.parametrize("fatal", [0, 2])
def test_killed_and_resumed_it_writes_the_same_bytes(case, fatal):
    settings = {"down": {"layer_name": ["down_proj"], "weight": W8, "act": STATIC}, **SEVERAL}
    plain, killed = (case(method="GPTQ", quant=mixed(settings), base={"checkpoint_every": 1}) for _ in range(2))
    expected = perplexities(plain.compress())

    class Killed(BaseException):
        pass

    class Fatal(Silent):
        def block(self, index, row):
            if index == fatal:
                raise Killed

    with pytest.raises(Killed):
        llmc.compress(killed.content, listener=Fatal())
    assert perplexities(killed.compress()) == expected
    assert killed.written() == plain.written()
    scales = [name for name in tensors_of(killed.save_path / VLLM) if name.endswith("input_scale")]
    assert len(scales) == 4


def test_the_dry_run_shows_each_scheme_and_the_summary_counts_all_bits(case, capsys):
    run = case(quant=mixed({**SEVERAL, "wide": {**SEVERAL["wide"], "act": A8}}))
    assert main([*run.arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    line = {text.split()[0]: text for text in shown if text.startswith("model.layers.")}
    assert "W8 channel sym, A8 token sym" in line["model.layers.1.mlp.down_proj"]
    assert "kept" in line["model.layers.0.mlp.down_proj"]
    assert "W4 g64 asym" in line["model.layers.2.self_attn.o_proj"]
    assert "W4 g32 asym" in line["model.layers.0.self_attn.o_proj"]
    assert not run.save_path.exists()
    metrics = run.compress().metrics
    attention, feed = 2 * 64 * 64 + 2 * 32 * 64, 64 * 128
    bits = 2 * attention * (4 + 20 / 32) + 2 * attention * (4 + 20 / 64)  # a group has a scale and a zero point
    bits += 8 * feed * (4 + 20 / 32) + 2 * (feed * 8 + 64 * 32)
    assert metrics["bits_per_weight"] == pytest.approx(bits / (4 * attention + 10 * feed), rel=1e-9)
    found = {(one["weight"]["bits"], one["act"] is not None): len(one["layers"]) for one in metrics["mixed_schemes"]}
    assert found == {(8, True): 2, (4, False): 8}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"a": {"layer_name": ["dwn_proj"], "weight": W8}}, ["mix_bits.a.layer_name: 'dwn_proj'", "'down_proj'"]),
        ({"a": {"layer_name": ["down_proj#4"], "weight": W8}}, ["down_proj#4", "no block 4", "blocks 0 to 3"]),
        (
            {
                "a": {"layer_name": ["gate_proj"], "weight": W8, "act": A8},
                "b": {"layer_name": ["up_proj"], "weight": W8, "act": {**A8, "symmetric": False}},
            },
            ["mlp.gate_proj", "mlp.up_proj", "same input", "A8 token asym"],
        ),
        ({"a": {"layer_name": ["q_proj"], "weight": G64}}, ["vLLM fuses", "q_proj", "k_proj", "quant.mix_bits"]),
        ({"a": {"layer_name": ["o_proj"], "weight": {**W8, "symmetric": False}}}, ["8-bit", "save_vllm"]),
        ({"a": {"layer_name": ["o_proj"], "weight": {**G64, "group_size": 48}}}, ["group_size", "48", "o_proj"]),
        ({"a": {"layer_name": ["o_proj"], "weight": {**W8, "bit": "e3m2"}}}, ["mix_bits.a.weight.bit: e3m2"]),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(case, capsys, monkeypatch, settings, said):
    from llmc.stream.source import BlockSource

    run = case(quant=mixed(settings))
    monkeypatch.setattr(BlockSource, "_read", lambda self, unit: pytest.fail(f"{unit} is read"))
    assert main(run.arguments) == 2
    message = capsys.readouterr().err
    assert [part for part in said if part not in message] == [], message
    assert not run.save_path.exists()


def test_static_ranges_of_a_setting_need_calibration_text(case, capsys):
    run = case(quant=mixed({"a": {"layer_name": ["o_proj"], "weight": W8, "act": STATIC}}), calib=None)
    assert main(run.arguments) == 2
    assert "quant.mix_bits (A8 tensor sym static) needs calibration text" in capsys.readouterr().err
    assert files_of(run.save_path.parent).keys() == {run.save_path.with_suffix(".yml").name}
