"""Whole runs into the folders of vLLM, SGLang and TensorRT-LLM: each holds the evaluated model."""

from __future__ import annotations

import json

import pytest
import torch
from cases import files_of, reload, write_tokenizer
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from test_pipeline import FAKE, VLLM, evaluation_windows, logits, perplexities, tensors_of
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

import llmc
from llmc.evaluating import stream_logits
from llmc.export import read_config
from llmc.export.modelopt_layouts import ALGORITHMS
from llmc.export.trtllm_check import check_trtllm
from llmc.finished import open_finished, prepare_again, read_metrics
from llmc.quant import PerChannel, PerGroup, PerTensor, QuantSpec
from llmc.run import Silent

SGL, TRTLLM = "sgl_quant_model", "trtllm_quant_model"
FP8 = {"bit": "e4m3", "symmetric": True}
INT4 = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 128}
STATIC = {**FP8, "granularity": "per_tensor", "static": True}
TOKEN8 = {"bit": 8, "symmetric": True, "granularity": "per_token"}
G32 = {"symmetric": True, "granularity": "per_group", "group_size": 32}
CACHE = {"method": "Naive", **STATIC}
SCHEMES = {
    "nvfp4": ({"bit": "nvfp4"}, None),
    "nvfp4 a4": ({"bit": "nvfp4"}, {"bit": "nvfp4"}),
    "mxfp4": ({"bit": "mxfp4"}, None),
    "mxfp4 a4": ({"bit": "mxfp4"}, {"bit": "mxfp4"}),
    "mxfp8": ({"bit": "mxfp8"}, {"bit": "mxfp8"}),
    "w3": ({**G32, "bit": 3}, None),
    "w2 asym": ({**G32, "bit": 2, "symmetric": False}, None),
    "w4a8": ({**G32, "bit": 4}, TOKEN8),
    "fp8 tensor": ({**FP8, "granularity": "per_tensor"}, STATIC),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_loads_the_vllm_folder_as_the_evaluated_model(case, name):
    weight, act = SCHEMES[name]
    run = case(method="GPTQ", quant={"weight": weight, "act": act}, eval={"eval_pos": []})
    run.compress()
    windows, dense = evaluation_windows(run), CompressedTensorsConfig(dequantize=True)
    fake = reload(run.save_path / FAKE)
    if "nvfp4" in name:  # whose weights Transformers makes bfloat16 numbers of
        for layer in fake.model.layers:
            for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
                linear.weight.data = linear.weight.bfloat16().float()
    theirs = logits(run.save_path / VLLM, windows, quantization_config=dense)
    with torch.no_grad():
        ours = [fake(input_ids=window[None], use_cache=False).logits[0] for window in windows]
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", ["RTN", "GPTQ", "Awq"])
def test_what_is_run_as_one_has_one_scale(case, method):
    weight, act = SCHEMES["fp8 tensor"]
    run = case(method=method, quant={"weight": weight, "act": act}, eval={"eval_pos": []})
    run.compress()
    stored = tensors_of(run.save_path / VLLM)
    for block in range(4):
        prefix = f"model.layers.{block}."
        for group in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            for part in ("weight_scale", "input_scale"):
                assert len({float(stored[f"{prefix}{name}_proj.{part}"]) for name in group}) == 1


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """A Llama whose widths groups of 128 divide."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(**shape, vocab_size=208, num_hidden_layers=2, max_position_embeddings=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


TRT = {
    "W4A16_AWQ": (INT4, None, {}),
    "W4A8_AWQ": (INT4, STATIC, {}),
    "FP8": ({**FP8, "granularity": "per_tensor"}, STATIC, {"kvcache": CACHE}),
    "FP8_PER_CHANNEL_PER_TOKEN": ({**FP8, "granularity": "per_channel"}, {**FP8, "granularity": "per_token"}, {}),
    "W8A16": ({"bit": 8, "symmetric": True, "granularity": "per_channel"}, None, {}),
    "NVFP4": ({"bit": "nvfp4"}, {"bit": "nvfp4"}, {"kvcache": CACHE}),
    "MIXED_PRECISION": (
        INT4,
        None,
        {"mix_bits": {"down": {"layer_name": ["down_proj"], "weight": {"bit": "nvfp4"}, "act": {"bit": "nvfp4"}}}},
    ),
}


def spec_of(algorithm: str) -> QuantSpec:
    """The grid of an algorithm's weights, as far as reading needs it."""
    return {
        "W4A16_AWQ": QuantSpec(4, True, PerGroup(128), scale_dtype=torch.bfloat16),
        "W4A8_AWQ": QuantSpec(4, True, PerGroup(128), scale_dtype=torch.bfloat16),
        "FP8": QuantSpec.floating("e4m3", PerTensor()),
        "FP8_PER_CHANNEL_PER_TOKEN": QuantSpec.floating("e4m3", PerChannel()),
        "W8A16": QuantSpec(8, True, PerChannel(), scale_dtype=torch.bfloat16),
        "NVFP4": QuantSpec.floating("e2m1", PerGroup(16), torch.float8_e4m3fn),
    }[algorithm]


@pytest.mark.parametrize("name", TRT)
def test_the_folder_for_tensorrt_is_what_its_loaders_ask_for_and_the_evaluated_model(case, wide, name):
    weight, act, further = TRT[name]
    save = {"save_vllm": False, "save_trtllm": True}
    run = case(wide, "GPTQ", quant={"weight": weight, "act": act, **further}, save=save, eval={"eval_pos": []})
    result = run.compress()
    folder = run.save_path / TRTLLM
    assert check_trtllm(folder) == []
    assert result.outputs["save_trtllm"]["serve"] == f"trtllm-serve {folder}"
    stored, fake = tensors_of(folder), tensors_of(run.save_path / FAKE)
    settings = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert settings["quant_algo"] == name
    linears = [key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")]
    assert len(linears) == 2 * 7
    for linear in linears:
        algorithm = settings.get("quantized_layers", {}).get(linear, settings)["quant_algo"]
        parts = {part: stored[f"{linear}.{part}"] for part in ALGORITHMS[algorithm].parts}
        dense = ALGORITHMS[algorithm].read(parts, spec_of(algorithm)).dequantize()
        assert torch.equal(dense, fake[f"{linear}.weight"].float())
    scales = [key for key in stored if key.endswith(("k_proj.k_scale", "v_proj.v_scale"))]
    assert len(scales) == (4 if "kvcache" in further else 0)
    assert ("kv_cache_scheme" in read_config(folder)["quantization_config"]) == ("kvcache" in further)


def test_the_cache_that_backends_are_told_of_computes_what_was_evaluated(case, wide):
    """compressed-tensors' own quantized cache, set up by the folder's ``config.json`` and scales: where this processor
    has no kernel for it, vLLM refuses."""
    run = case(
        wide, "RTN", quant={"weight": {**FP8, "granularity": "per_channel"}, "kvcache": CACHE}, eval={"eval_pos": []}
    )
    run.compress()
    folder, model, windows = run.save_path / VLLM, reload(run.save_path / FAKE), list(evaluation_windows(run))
    told = read_config(folder)["quantization_config"]["kv_cache_scheme"]
    frozen = {"config_groups": {}, "quantization_status": "frozen", "ignore": []}
    apply_quantization_config(model, QuantizationConfig(kv_cache_scheme=told, **frozen))
    scales = {name: tensor for name, tensor in tensors_of(folder).items() if name.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 4 and model.load_state_dict(scales, strict=False).unexpected_keys == []
    metrics = read_metrics(run.save_path)
    done = open_finished(run.save_path, metrics, prepare_again(metrics))
    ours = {state: [] for state in ("fake_quant", "fake_quant_wo_kv")}
    for state, seen in ours.items():
        stream_logits(
            done, state, [ids[None] for ids in windows], lambda _, start, logits, seen=seen: seen.append(logits)
        )
    with torch.no_grad():
        theirs = [model(input_ids=ids[None]).logits for ids in windows]
    assert all(torch.equal(*pair) for pair in zip(theirs, ours["fake_quant"], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(theirs, ours["fake_quant_wo_kv"], strict=True))


def test_several_folders_of_one_run_hold_the_same_model(case, wide):
    save = {"save_sgl": True, "save_trtllm": True}
    weight = {"bit": 8, "symmetric": True, "granularity": "per_channel"}
    run = case(wide, "GPTQ", quant={"weight": weight, "act": None}, save=save, eval={"eval_pos": []})
    result = run.compress()
    assert result.outputs.keys() == {"save_vllm", "save_sgl", "save_trtllm", "save_fake"}
    vllm, sgl, trtllm = (tensors_of(run.save_path / folder) for folder in (VLLM, SGL, TRTLLM))
    assert vllm.keys() == sgl.keys()
    assert all(torch.equal(vllm[name], sgl[name]) for name in vllm)
    assert read_config(run.save_path / VLLM) == read_config(run.save_path / SGL)
    name = "model.layers.1.mlp.down_proj"
    words = vllm[f"{name}.weight_packed"].view(torch.uint8).to(torch.int16) - 128
    assert torch.equal(words.to(torch.int8), trtllm[f"{name}.weight"])
    assert torch.equal(vllm[f"{name}.weight_scale"].flatten().float(), trtllm[f"{name}.weight_scale"])


@pytest.mark.parametrize("name", ["NVFP4", "W4A8_AWQ"])
def test_killed_and_resumed_it_writes_the_same_bytes(case, wide, name):
    weight, act, further = TRT[name]
    runs = [
        case(
            wide,
            "GPTQ",
            quant={"weight": weight, "act": act, **further},
            save={"save_vllm": False, "save_trtllm": True},
            base={"checkpoint_every": 1},
        )
        for _ in range(2)
    ]
    plain, killed = runs
    expected = perplexities(plain.compress())

    class Killed(BaseException):
        pass

    class Fatal(Silent):
        def block(self, index, row):
            raise Killed

    with pytest.raises(Killed):
        llmc.compress(killed.content, listener=Fatal())
    assert not (killed.save_path / TRTLLM / "hf_quant_config.json").exists()
    assert perplexities(killed.compress()) == expected
    assert killed.written() == plain.written()
    assert f"{TRTLLM}/hf_quant_config.json" in files_of(killed.save_path)


def test_rotations_that_run_with_the_model_are_refused_for_sglang(case):
    special = {"Quarot": {"online_rotate": True}}
    run = case(method=["Quarot", "RTN"], quant={"special": special}, save={"save_vllm": False, "save_sgl": True})
    with pytest.raises(llmc.errors.ExportError, match="online_rotate: True with save_sgl") as error:
        run.compress()
    assert "online_rotate: False" in error.value.remedy
