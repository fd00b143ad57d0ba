"""LightLLM's three forms; of W8A8, the codes that LightLLM finds by itself are the evaluated ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmc.errors import ExportError
from llmc.export import Layer, check_shard
from llmc.export.lightllm import LightLLM
from llmc.quant import (
    ActSpec,
    IntGrid,
    KvSpec,
    Mse,
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

INT4 = QuantSpec(4, False, PerGroup(128), scale_dtype=torch.float16)
BLOCKS, GROUPS = QuantSpec.floating("e4m3", PerBlock(128)), ActSpec(QuantSpec.floating("e4m3", PerGroup(128)))
INT8, TOKEN = QuantSpec(8, True, PerChannel()), ActSpec(QuantSpec(8, True, PerToken()))
ROUTES = {
    "int4 asym": (INT4, None),
    "int4 sym": (replace(INT4, symmetric=True, granularity=PerGroup(32)), None),
    "fp8": (BLOCKS, GROUPS),
    "w8a8": (INT8, TOKEN),
}
ROWS, COLUMNS = 128, 256


def exporter(spec: QuantSpec | None, act: ActSpec | None = None, **more: Any) -> LightLLM:
    return LightLLM(spec, torch.bfloat16, torch.float32, act, **more)


def weight(seed: int = 0, rows: int = ROWS, spread: float = 3.0) -> Tensor:
    """Rows whose magnitudes differ by orders."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (torch.rand(rows, 1, generator=generator) * 2 * spread - spread)
    return torch.randn(rows, COLUMNS, generator=generator) * size


def record(spec: QuantSpec, seed: int = 0) -> UnitRecord:
    plain = {"norm.weight": torch.ones(COLUMNS).bfloat16(), "fc.bias": torch.ones(ROWS).bfloat16()}
    return UnitRecord(plain=plain, quantized={"fc": quantize_weight(weight(seed), spec)})


def layers(spec: QuantSpec | None, act: ActSpec | None, rows: int = ROWS, columns: int = COLUMNS) -> list[Layer]:
    return [Layer("fc", rows, columns, spec, ("fc",), act=act)]


def as_lightllm_loads(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales, row by row, by the rule that LightLLM applies with --quant_type vllm-w8a8."""
    codes, scales = [], []
    for row in stored:
        scale = row.float().abs().max() / torch.tensor(127.0)
        codes.append(torch.tensor([round(float(value / scale)) if scale > 0 else 0 for value in row.float()]))
        scales.append(scale)
    return torch.stack(codes), torch.stack(scales)[:, None]


def test_lightllm_finds_the_very_codes_and_scales():
    unit = record(INT8)
    stored = exporter(INT8, TOKEN).tensors(unit)["fc.weight"]
    codes, scales = as_lightllm_loads(stored)
    assert stored.dtype == torch.float32
    assert torch.equal(codes, unit.quantized["fc"].codes.long())
    assert torch.equal(scales, unit.quantized["fc"].scale)
    assert torch.equal(codes * scales, unit.quantized["fc"].dequantize())


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_whatever_is_rounded_to_nearest_comes_back(seed, dtype):
    original = weight(seed, rows=16, spread=1.0).to(dtype)
    original[3] = 0
    original[4, :-1] = 0
    quantized = quantize_weight(original, INT8)
    stored = exporter(INT8, TOKEN).tensors(UnitRecord(quantized={"fc": quantized}))["fc.weight"]
    codes, scales = as_lightllm_loads(stored)
    assert torch.equal(codes, quantized.codes.long())
    assert torch.equal(codes * scales, quantized.dequantize())
    assert stored[3].abs().max() == 0


def test_in_bfloat16_other_codes_would_come_back_and_in_float16_another_scale():
    quantized = quantize_weight(weight(spread=0.5), INT8)
    dense = quantized.dequantize()
    codes, _ = as_lightllm_loads(dense.bfloat16())
    assert (codes != quantized.codes).any()
    codes, scales = as_lightllm_loads(dense.half())
    assert torch.equal(codes, quantized.codes.long())
    assert not torch.allclose(scales, quantized.scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("largest", [126, -128])
def test_a_row_without_the_largest_code_stops_the_run_with_the_name_of_its_linear(largest):
    quantized = quantize_weight(weight(), INT8)
    codes = quantized.codes.clone()
    codes[5] = codes[5].clamp(-126, 126)
    codes[5, 0] = largest
    with pytest.raises(ExportError) as error:
        exporter(INT8, TOKEN).tensors(UnitRecord(quantized={"layers.3.fc": replace(quantized, codes=codes)}))
    assert "layers.3.fc" in error.value.message
    assert "in 1 of 128 rows" in error.value.message
    assert f"the largest code of row 5 is {abs(largest)}, not 127" in error.value.message
    assert "RTN" in error.value.remedy


@pytest.mark.parametrize(("spec", "act"), ROUTES.values(), ids=ROUTES)
def test_every_route_reads_back_and_passes_its_check(tmp_path, spec, act):
    unit, fmt, path = record(spec), exporter(spec, act), tmp_path / "shard.safetensors"
    stored = fmt.tensors(unit)
    save_file(stored, path)
    check_shard(path, fmt, unit)
    back, dense = fmt.read(load_file(path)), unit.quantized["fc"].dequantize()
    found = back.plain["fc.weight"] if spec == INT8 else back.quantized["fc"].dequantize()
    assert torch.equal(found, dense)
    assert {"norm.weight", "fc.bias"} <= back.plain.keys()
    other = fmt.independent(stored, "fc")
    assert other is None if spec == INT8 else torch.equal(other.float(), dense)
    size = sum(tensor.nbytes for name, tensor in stored.items() if name not in unit.plain)
    assert size == fmt.nbytes(layers(spec, act)[0])


def test_fp8_tensors_are_codes_and_what_they_are_multiplied_by():
    stored, codes = exporter(BLOCKS, GROUPS).tensors(record(BLOCKS)), record(BLOCKS).quantized["fc"]
    assert stored["fc.weight"].dtype == torch.float8_e4m3fn
    assert (stored["fc.weight_scale_inv"].dtype, stored["fc.weight_scale_inv"].shape) == (torch.float32, (1, 2))
    for block in range(2):
        own = slice(128 * block, 128 * (block + 1))
        by_hand = stored["fc.weight"][:, own].float() * stored["fc.weight_scale_inv"][0, block]
        assert torch.equal(by_hand, codes.dequantize()[:, own])


def test_int4_is_autoawqs_layout():
    stored = exporter(INT4).tensors(record(INT4))
    assert (stored["fc.qweight"].shape, stored["fc.qzeros"].shape) == ((COLUMNS, ROWS // 8), (2, ROWS // 8))
    assert stored["fc.scales"].dtype == torch.float16


def test_a_flipped_bit_fails_the_check(tmp_path):
    fmt, unit, path = exporter(INT8, TOKEN), record(INT8), tmp_path / "shard.safetensors"
    stored = fmt.tensors(unit)
    stored["fc.weight"][7, 7] *= 1 + 2**-23
    save_file(stored, path)
    with pytest.raises(ExportError, match=r"fc\.weight holds other values"):
        check_shard(path, fmt, unit)


def test_configs_and_launch_options(tmp_path):
    original = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": {"quant_method": "old"}}
    made = {name: exporter(*route).config(original, layers(*route)) for name, route in ROUTES.items()}
    assert made["w8a8"] == {"model_type": "llama", "dtype": "bfloat16"}
    assert made["fp8"] == {
        **made["w8a8"],
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    }
    assert made["int4 sym"]["dtype"] == "float16"
    assert made["int4 sym"]["quantization_config"]["quant_method"] == "awq"
    assert made["int4 sym"]["quantization_config"]["group_size"] == 32
    commands = {name: exporter(*route).serve(tmp_path) for name, route in ROUTES.items()}
    assert all(f"lightllm.server.api_server --model_dir {tmp_path}" in command for command in commands.values())
    assert [name for name, command in commands.items() if "--quant_type vllm-w8a8 --tp 1" in command] == ["w8a8"]
    assert "--data_type fp16" in commands["int4 asym"]


@pytest.mark.parametrize(("spec", "act"), ROUTES.values(), ids=ROUTES)
def test_what_it_runs_is_accepted_and_of_w8a8_the_condition_is_said(spec, act):
    warnings = exporter(spec, act).check(layers(spec, act))
    assert len(warnings) == (spec == INT8)
    assert all("RTN" in warning and "--tp 1" in warning for warning in warnings)


STATIC = ActSpec(QuantSpec(8, True, PerTensor()), StaticMinMax())
AWQ_TEXT, FP8_TEXT, INT8_TEXT = "group_size: 128} without act", "per_block", "bit: 8, symmetric: True"


@pytest.mark.parametrize(
    ("spec", "act", "problem", "remedy"),
    [
        (replace(INT4, bits=3), None, "W3", "bit: 4"),
        (replace(INT8, scale_dtype=torch.float16), None, "W8 channel sym", "bit: 4"),
        (replace(INT4, granularity=PerGroup(16)), None, "W4 g16", "32, 64, 128"),
        (replace(INT4, granularity=PerChannel()), None, "W4 channel", "32, 64, 128"),
        (replace(INT4, scale_dtype=torch.float32), None, "float16", "scale_dtype: float16"),
        (replace(INT4, scale_dtype=torch.float32), TOKEN, "W4 g128 asym, A8 token sym", "runs: weight {bit: 4"),
        (INT8, STATIC, "A8 tensor sym static", f"runs: weight {{{INT8_TEXT}"),
        (INT8, ActSpec(replace(TOKEN.grid, symmetric=False)), "A8 token asym", f"runs: weight {{{INT8_TEXT}"),
        (INT8, ActSpec(replace(TOKEN.grid, bits=6)), "A6 token sym", f"runs: weight {{{INT8_TEXT}"),
        (replace(INT8, symmetric=False), TOKEN, "W8 channel asym", f"runs: weight {{{INT8_TEXT}"),
        (replace(INT8, granularity=PerGroup(64)), TOKEN, "W8 g64", f"runs: weight {{{INT8_TEXT}"),
        (replace(INT8, sym_mode="full"), TOKEN, "max|w| / 127", "without sym_mode"),
        (replace(INT8, ranges=Mse()), TOKEN, "max|w| / 127", "calib_algo: mse"),
        (replace(INT8, scale_dtype=torch.float16), TOKEN, "in float32", "scale_dtype"),
        (BLOCKS, None, "W8 e4m3 block128", "runs: weight {bit: e4m3"),
        (QuantSpec.floating("e4m3", PerChannel()), GROUPS, "W8 e4m3 channel", "runs: weight {bit: e4m3"),
        (QuantSpec.floating("e5m2", PerBlock(128)), GROUPS, "W8 e5m2", "runs: weight {bit: e4m3"),
        (BLOCKS, ActSpec(QuantSpec.floating("e4m3", PerToken())), "A8 e4m3 token", "runs: weight {bit: e4m3"),
    ],
)
def test_other_schemes_are_refused_with_the_nearest(spec, act, problem, remedy):
    with pytest.raises(ExportError) as error:
        exporter(spec, act).check(layers(spec, act))
    assert "save_lightllm" in error.value.message
    assert problem in error.value.message
    assert remedy in error.value.remedy
    assert "save_" in error.value.remedy or "scale_dtype" in error.value.remedy


@pytest.mark.parametrize(("spec", "act"), ROUTES.values(), ids=ROUTES)
def test_an_ignored_linear_and_a_quantized_cache_are_refused(spec, act):
    mixed = [*layers(spec, act), replace(layers(None, None)[0], name="down")]
    with pytest.raises(ExportError, match="down isn't quantized") as error:
        exporter(spec, act).check(mixed)
    assert "ignored_layers" in error.value.remedy
    kv = KvSpec("Naive", IntGrid(8, True, False, torch.float16), PerToken(), 0, static=False)
    with pytest.raises(ExportError, match=r"save_lightllm.*quant\.kvcache"):
        exporter(spec, act, kv=kv).check(layers(spec, act))
    with pytest.raises(ExportError, match="quantizes none"):
        exporter(None).check(layers(None, None))


@pytest.mark.parametrize(("rows", "columns"), [(130, 256), (128, 192)])
def test_fp8_blocks_must_divide_the_weight(rows, columns):
    with pytest.raises(ExportError, match=f"fc: blocks of 128 don't divide {rows} x {columns}"):
        exporter(BLOCKS, GROUPS).check(layers(BLOCKS, GROUPS, rows, columns))
