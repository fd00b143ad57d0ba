"""W8A8 for vLLM: codes as computed, static input scales, and what compressed-tensors makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file

from llmc.errors import ExportError
from llmc.export import Layer, check_shard
from llmc.export.dense import FakeQuant, Transformed
from llmc.export.vllm import VLLM
from llmc.quant import (
    ActSpec,
    InputRange,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    StaticMinMax,
    UnitRecord,
    quantize_weight,
)

INT8, FP8 = QuantSpec(8, True, PerChannel()), QuantSpec.floating("e4m3", PerChannel())
BLOCKS = QuantSpec.floating("e4m3", PerBlock(128))
TOKEN8, TOKEN_FP8 = QuantSpec(8, True, PerToken()), QuantSpec.floating("e4m3", PerToken())
TENSOR8, TENSOR_FP8 = QuantSpec(8, False, PerTensor()), QuantSpec.floating("e4m3", PerTensor())
LOADABLE = {
    "int8 token": (INT8, ActSpec(TOKEN8)),
    "int8 token asym": (INT8, ActSpec(replace(TOKEN8, symmetric=False))),
    "int8 tensor": (replace(INT8, granularity=PerTensor()), ActSpec(TOKEN8)),
    "int8 static": (INT8, ActSpec(replace(TENSOR8, symmetric=True), StaticMinMax())),
    "int8 static asym": (INT8, ActSpec(TENSOR8, StaticMinMax())),
    "fp8 token": (FP8, ActSpec(TOKEN_FP8)),
    "fp8 static": (FP8, ActSpec(TENSOR_FP8, StaticMinMax())),
    "fp8 blocks": (BLOCKS, ActSpec(QuantSpec.floating("e4m3", PerGroup(128)))),
    "fp8 weights": (FP8, None),
}
FOUND = InputRange(-1.5, 3.0)


def exporter(spec: QuantSpec, act: ActSpec | None) -> VLLM:
    return VLLM(spec, torch.bfloat16, torch.float32, act)


def record(spec: QuantSpec, act: ActSpec | None, rows: int = 200, columns: int = 256) -> UnitRecord:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    return UnitRecord(
        plain={"norm.weight": torch.randn(columns, generator=generator).bfloat16(), "norm.bias": torch.ones(3)},
        quantized={"fc": quantize_weight(weight, spec)},
        inputs={"fc": FOUND} if act is not None and act.observer is not None else {},
    )


@pytest.mark.parametrize("name", LOADABLE)
def test_what_is_written_reads_back_and_decompresses_to_the_evaluated_weight(name, tmp_path):
    spec, act = LOADABLE[name]
    unit, fmt = record(spec, act), exporter(spec, act)
    assert fmt.check([Layer("fc", 200, 256, spec, ("fc",), act=act)]) == []
    stored = fmt.tensors(unit)
    back = fmt.read(stored)
    weight, found = unit.quantized["fc"], back.quantized["fc"]
    assert back.plain.keys() == unit.plain.keys()
    assert found.codes.dtype == weight.codes.dtype
    assert torch.equal(found.codes.float(), weight.codes.float())
    assert torch.equal(found.scale, weight.scale)
    assert torch.equal(fmt.independent(stored, "fc"), weight.dequantize())
    save_file(stored, tmp_path / "shard.safetensors")
    check_shard(tmp_path / "shard.safetensors", fmt, unit)
    planned = fmt.nbytes(Layer("fc", 200, 256, spec, ("fc",), act=act))
    assert planned == sum(tensor.nbytes for key, tensor in stored.items() if key.startswith("fc."))


@pytest.mark.parametrize("name", LOADABLE)
def test_tensors_have_the_names_shapes_and_dtypes_that_the_loader_asks_for(name):
    spec, act = LOADABLE[name]
    stored = exporter(spec, act).tensors(record(spec, act))
    scales = {"int8 tensor": (1,), "fp8 blocks": (2, 2)}.get(name, (200, 1))
    expected = {
        "weight": (torch.int8 if spec.grid == "int" else torch.float8_e4m3fn, (200, 256)),
        "weight_scale": (torch.float32, scales),
    }
    if "static" in name:
        expected["input_scale"] = (torch.float32, (1,))
    if name == "int8 static asym":
        expected["input_zero_point"] = (torch.int8, (1,))
    assert {k[3:]: (t.dtype, tuple(t.shape)) for k, t in stored.items() if k.startswith("fc.")} == expected


@pytest.mark.parametrize(
    ("name", "scale", "zero"),
    [("int8 static", 3 / 127, None), ("int8 static asym", 4.5 / 255, -43), ("fp8 static", 3 / 448, None)],
)
def test_static_scales_follow_from_the_calibrated_range(name, scale, zero):
    spec, act = LOADABLE[name]
    stored = exporter(spec, act).tensors(record(spec, act))
    assert stored["fc.input_scale"].item() == pytest.approx(scale, rel=1e-6)
    assert (None if zero is None else stored["fc.input_zero_point"].item()) == zero
    assert zero is not None or "fc.input_zero_point" not in stored


@pytest.mark.parametrize("name", LOADABLE)
def test_the_config_says_what_is_stored(name):
    spec, act = LOADABLE[name]
    config = exporter(spec, act).config({"model_type": "llama"}, [Layer("fc", 200, 256, spec, ("fc",), act=act)])
    loaded = QuantizationConfig.model_validate(config["quantization_config"])
    scheme = loaded.config_groups["group_0"]
    assert loaded.format == scheme.format == ("int-quantized" if spec.grid == "int" else "float-quantized")
    strategies = {"int8 tensor": "tensor", "fp8 blocks": "block"}
    assert (scheme.weights.strategy, scheme.weights.num_bits) == (strategies.get(name, "channel"), 8)
    assert scheme.weights.block_structure == ([128, 128] if name == "fp8 blocks" else None)
    given = scheme.input_activations
    if act is None:
        assert given is None
        return
    assert given.strategy == {PerToken: "token", PerTensor: "tensor", PerGroup: "group"}[type(act.grid.granularity)]
    assert (given.dynamic, given.symmetric) == ("static" not in name, "asym" not in name)
    assert given.type == ("int" if spec.grid == "int" else "float")


def test_blocks_that_would_straddle_two_fused_linears_are_refused():
    spec, act = LOADABLE["fp8 blocks"]
    with pytest.raises(ExportError, match="divide its 192 rows") as error:
        exporter(spec, act).check([Layer(name, 192, 256, spec, ("q", "k"), act=act) for name in ("q", "k")])
    assert "per_channel" in error.value.remedy
    assert exporter(spec, act).check([Layer(name, 256, 256, spec, ("q", "k"), act=act) for name in ("q", "k")]) == []


def test_the_fake_quantized_folder_says_that_activations_are_not_in_it():
    (warning,) = FakeQuant(INT8, torch.bfloat16, torch.float32, ActSpec(TOKEN8)).check([])
    assert "save_fake" in warning
    assert "A8 token sym" in warning
    assert Transformed(INT8, torch.bfloat16, torch.float32, ActSpec(TOKEN8)).check([]) == []


def test_linears_that_are_fused_are_quantized_alike():
    layers = [Layer(name, 64, 128, spec, ("q", "k"), None) for name, spec in (("q", FP8), ("k", None))]
    with pytest.raises(ExportError, match="vLLM fuses q, k"):
        exporter(FP8, ActSpec(TOKEN_FP8)).check(layers)


@pytest.mark.parametrize("name", ["int8 token", "fp8 token"])
def test_one_wrong_code_fails_the_check(name, tmp_path):
    spec, act = LOADABLE[name]
    unit, fmt = record(spec, act), exporter(spec, act)
    stored = fmt.tensors(unit)
    damaged = stored["fc.weight"].clone()
    damaged.view(torch.uint8)[7, 7] ^= 1
    save_file(stored | {"fc.weight": damaged}, tmp_path / "shard.safetensors")
    with pytest.raises(ExportError, match=r"fc.weight holds other values"):
        check_shard(tmp_path / "shard.safetensors", fmt, unit)
