"""The folder for TensorRT-LLM: as nvidia-modelopt writes it (recorded by scripts/record_modelopt.py), and as loaded."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmc.errors import ExportError
from llmc.export import Layer, check_shard
from llmc.export.modelopt_layouts import ALGORITHMS, pack_rows, unpack_rows
from llmc.export.trtllm import TRTLLM
from llmc.export.trtllm_check import check_trtllm
from llmc.export.trtllm_config import quantization_config
from llmc.export.trtllm_schemes import algorithm_of
from llmc.quant import (
    ActSpec,
    Fp8Grid,
    InputRange,
    KvSpec,
    PerChannel,
    PerCluster,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    Scheme,
    StaticMinMax,
    UnitRecord,
    bind_global_scale,
    quantize_weight,
)

RECORD = json.loads((Path(__file__).parent / "modelopt.json").read_text())
BF16, NV, MX = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu
INT4 = QuantSpec(4, True, PerGroup(128), scale_dtype=BF16)
INT8 = QuantSpec(8, True, PerChannel(), scale_dtype=BF16)
FP8_TENSOR, FP8_ROWS = (QuantSpec.floating("e4m3", grain) for grain in (PerTensor(), PerChannel()))
NVFP4 = QuantSpec.floating("e2m1", PerGroup(16), NV)
STATIC = ActSpec(QuantSpec.floating("e4m3", PerTensor()), StaticMinMax())
TOKEN = ActSpec(QuantSpec.floating("e4m3", PerToken()))
FOUR = ActSpec(NVFP4, StaticMinMax())
SCHEMES = {
    "W4A16_AWQ": Scheme(INT4),
    "W4A8_AWQ": Scheme(INT4, STATIC),
    "FP8": Scheme(FP8_TENSOR, STATIC),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(FP8_ROWS, TOKEN),
    "W8A16": Scheme(INT8),
    "NVFP4": Scheme(NVFP4, FOUR),
}
CACHE = KvSpec("Naive", Fp8Grid(torch.float8_e4m3fn), PerTensor(), static=True)
BLOCK = "model.layers.0."
SHAPES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (512, 256),
    "mlp.up_proj": (512, 256),
    "mlp.down_proj": (256, 512),
}
FUSED = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
FOUND = InputRange(-1.5, 3.0)


def schemes_of(case: str) -> dict[str, Scheme]:
    """The scheme of each Linear of a block."""
    if case == "mixed":
        return {name: SCHEMES["NVFP4" if name == "mlp.down_proj" else "FP8"] for name in SHAPES}
    return {name: SCHEMES[case.split()[0]] for name in SHAPES}


def layers_of(schemes: dict[str, Scheme | None]) -> list[Layer]:
    groups = {name: group for group in FUSED for name in group}
    return [
        Layer(
            BLOCK + name,
            *SHAPES[name],
            None if scheme is None else scheme.weight,
            tuple(BLOCK + other for other in groups.get(name, (name,))),
            act=None if scheme is None else scheme.act,
        )
        for name, scheme in schemes.items()
    ]


def exporter(case: str, layers: list[Layer]) -> TRTLLM:
    own = SCHEMES["FP8" if case == "mixed" else case.split()[0]]
    schemes = {layer.name: layer.scheme for layer in layers if layer.scheme != own and layer.spec is not None}
    kv = CACHE if "cache" in case else None
    fused = {layer.name: layer.fused for layer in layers}
    return TRTLLM(own.weight, BF16, torch.float32, own.act, kv, schemes, fused)


def record(layers: list[Layer], *, cache: bool = False) -> UnitRecord:
    generator = torch.Generator().manual_seed(0)
    # Of Linears that are run as one, the last has the largest weights.
    sizes = {x.name: 1.0 + x.fused.index(x.name) for x in layers}
    weights = {x.name: sizes[x.name] * torch.randn(x.rows, x.columns, generator=generator) for x in layers if x.spec}
    specs = {
        x.name: bind_global_scale(x.spec, [weights[name] for name in x.fused]) for x in layers if x.spec is not None
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    return UnitRecord(
        plain={f"{BLOCK}{norm}.weight": torch.randn(256, generator=generator).bfloat16() for norm in norms},
        quantized={name: quantize_weight(weight, specs[name]) for name, weight in weights.items()},
        inputs={x.name: FOUND for x in layers if x.act is not None and x.act.observer is not None},
        cache={f"{BLOCK}self_attn.{which}_scale": torch.tensor([0.5]) for which in "kv"} if cache else {},
    )


def described(tensors: dict[str, Tensor]) -> dict[str, list[object]]:
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sorted(tensors.items())}


def sample() -> Tensor:
    """The weight ``[4, 128]`` of the record."""
    return ((torch.arange(512) * 37) % 101 - 50).reshape(4, 128) / 64


def bytes_of(tensor: Tensor) -> str:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes().hex()


@pytest.mark.parametrize("case", RECORD["exports"])
def test_names_dtypes_and_shapes_are_those_that_modelopt_writes(case):
    layers = layers_of(schemes_of(case))
    stored = exporter(case, layers).tensors(record(layers, cache="cache" in case))
    assert described(stored) == RECORD["exports"][case]["tensors"]


@pytest.mark.parametrize("case", RECORD["exports"])
def test_both_configurations_say_what_modelopt_says(case):
    layers = layers_of(schemes_of(case))
    fmt, theirs = exporter(case, layers), RECORD["exports"][case]
    ours = fmt.extra_files({}, layers)["hf_quant_config.json"]
    excluded = ours["quantization"].pop("exclude_modules")
    theirs["hf_quant_config"]["quantization"].pop("exclude_modules", None)
    assert ours == theirs["hf_quant_config"]
    config = fmt.config({"model_type": "llama"}, layers)
    assert config.pop("model_type") == "llama"
    assert config["quantization_config"].pop("ignore") == excluded
    assert {key: value for key, value in theirs["quantization_config"].items() if key != "ignore"} == config[
        "quantization_config"
    ]
    assert "lm_head" in excluded


@pytest.mark.parametrize("name", RECORD["groups"])
def test_other_readers_are_told_of_each_algorithm_as_modelopt_tells_them(name):
    algorithms = {"a": ALGORITHMS[name], "b": ALGORITHMS["FP8" if name == "NVFP4" else "NVFP4"]}
    groups = quantization_config(algorithms, [], cache=False)["config_groups"].values()
    (found,) = (group for group in groups if group["targets"] == ["a"])
    assert found == {**RECORD["groups"][name], "targets": ["a"]}


@pytest.mark.parametrize("name", [name for name in RECORD["packed"] if name != "W4A16_AWQ"])
def test_values_are_those_that_modelopt_packs(name):
    spec = replace(SCHEMES[name].weight, scale_dtype=torch.float32) if name == "W8A16" else SCHEMES[name].weight
    weight = quantize_weight(sample(), spec)
    stored, theirs = ALGORITHMS[name].tensors(weight, [weight]), dict(RECORD["packed"][name])
    theirs.pop("dequantized", None)
    assert {part: bytes_of(tensor) for part, tensor in stored.items()} == theirs


def test_our_reader_gives_the_values_that_modelopt_gives():
    theirs = {part: torch.frombuffer(bytearray.fromhex(data), dtype=torch.uint8) for part, data in
              RECORD["packed"]["NVFP4"].items()}  # fmt: skip
    stored = {
        "weight": theirs["weight"].reshape(4, 64),
        "weight_scale": theirs["weight_scale"].view(NV).reshape(4, 8),
        "weight_scale_2": theirs["weight_scale_2"].view(torch.float32).reshape(()),
    }
    dense = ALGORITHMS["NVFP4"].read(stored, NVFP4).dequantize()
    # They multiply by what we divide by the reciprocal of.
    torch.testing.assert_close(dense, theirs["dequantized"].view(torch.float32).reshape(4, 128), rtol=3e-7, atol=0)


def test_four_bits_are_packed_as_modelopt_packs_them():
    weight = sample()
    codes = (weight / (weight.abs().amax(1, keepdim=True) / 7)).round().clamp(-8, 7).to(torch.int8)
    assert bytes_of(pack_rows(codes)) == RECORD["packed"]["W4A16_AWQ"]["weight"]
    every = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1).T.contiguous()
    assert torch.equal(unpack_rows(pack_rows(every)), every)


def write(folder: Path, case: str, *, ignored: str | None = None) -> list[Layer]:
    """A whole folder of one block."""
    schemes = {name: None if name == ignored else scheme for name, scheme in schemes_of(case).items()}
    layers = layers_of(schemes)
    fmt, unit = exporter(case, layers), record(layers, cache="cache" in case)
    original = {"model_type": "llama", "dtype": "bfloat16"}
    plain = {f"{x.name}.weight": torch.zeros(x.rows, x.columns, dtype=BF16) for x in layers if x.spec is None}
    save_file(fmt.tensors(replace(unit, plain=unit.plain | plain)), folder / "model.safetensors")
    files = {"config.json": fmt.config(original, layers)} | fmt.extra_files(original, layers)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return layers


@pytest.mark.parametrize("case", [*RECORD["exports"], "W4A16_AWQ cache", "NVFP4 cache"])
def test_every_folder_is_what_the_loaders_ask_for(case, tmp_path):
    write(tmp_path, case)
    assert check_trtllm(tmp_path) == []


@pytest.mark.parametrize("case", SCHEMES)
def test_a_linear_that_is_left_alone_is_excluded_by_its_name(case, tmp_path):
    write(tmp_path, case, ignored="mlp.down_proj")
    assert check_trtllm(tmp_path) == []
    stored = json.loads((tmp_path / "hf_quant_config.json").read_text())
    assert f"{BLOCK}mlp.down_proj" in stored["quantization"]["exclude_modules"]


def changed(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("case", "change", "problem"),
    [
        ("W4A16_AWQ", lambda t: t.pop(f"{BLOCK}self_attn.o_proj.pre_quant_scale"), "o_proj.pre_quant_scale is missing"),
        ("W4A8_AWQ", lambda t: t[f"{BLOCK}self_attn.k_proj.weight_scale_2"].mul_(2), "have different weight_scale_2"),
        ("FP8", lambda t: t[f"{BLOCK}mlp.up_proj.weight_scale"].mul_(2), "have different weight_scale"),
        ("NVFP4", lambda t: t[f"{BLOCK}mlp.up_proj.input_scale"].mul_(2), "have different input_scale"),
        ("FP8", lambda t: t.pop(f"{BLOCK}mlp.down_proj.input_scale"), "down_proj.input_scale is missing"),
        (
            "W8A16",
            lambda t: t.update({f"{BLOCK}mlp.down_proj.weight_scale": torch.ones(256, 1)}),
            r"weight_scale is torch.float32 \(256, 1\), not torch.float32 \(256,\)",
        ),
        (
            "W4A8_AWQ",
            lambda t: t.update({f"{BLOCK}mlp.down_proj.pre_quant_scale": torch.ones(512)}),
            "pre_quant_scale is torch.float32",
        ),
        ("FP8 cache", lambda t: t.pop(f"{BLOCK}self_attn.v_proj.v_scale"), "k_scale is there without its pair"),
    ],
)
def test_what_the_loaders_would_stumble_over_is_named(case, change, problem, tmp_path):
    write(tmp_path, case)
    changed(tmp_path, change)
    (found,) = check_trtllm(tmp_path)
    assert re.search(problem, found), found


def test_configurations_that_disagree_are_named(tmp_path):
    write(tmp_path, "W8A16")
    stored = json.loads((tmp_path / "hf_quant_config.json").read_text())
    stored["quantization"]["quant_algo"] = "W8A8_SQ_PER_CHANNEL"
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(stored))
    problems = check_trtllm(tmp_path)
    assert [part for part in ("differ in quant_algo", "no method for W8A8") if part not in " ".join(problems)] == []


@pytest.mark.parametrize("case", [*RECORD["exports"], "W4A16_AWQ cache"])
def test_what_is_written_reads_back_exactly(case, tmp_path):
    layers = layers_of(schemes_of(case))
    fmt, unit = exporter(case, layers), record(layers, cache="cache" in case)
    stored = fmt.tensors(unit)
    back = fmt.read(stored)
    assert back.plain.keys() == unit.plain.keys()
    assert {name: float(scale) for name, scale in back.cache.items()} == {n: float(s) for n, s in unit.cache.items()}
    for name, weight in unit.quantized.items():
        found = back.quantized[name]
        assert torch.equal(found.codes.float(), weight.codes.float())
        assert torch.equal(found.scale.float(), weight.scale.float())
        assert found.scale.dtype == weight.scale.dtype
        assert torch.equal(found.dequantize(), weight.dequantize())
    save_file(stored, tmp_path / "shard.safetensors")
    check_shard(tmp_path / "shard.safetensors", fmt, unit)


@pytest.mark.parametrize("case", SCHEMES)
def test_the_planned_bytes_are_the_written_ones(case):
    layers = layers_of(schemes_of(case))
    fmt, unit = exporter(case, layers), record(layers)
    stored = {name: tensor for name, tensor in fmt.tensors(unit).items() if name not in unit.plain}
    assert sum(fmt.nbytes(layer) for layer in layers) == sum(tensor.nbytes for tensor in stored.values())


def test_the_second_scale_of_four_bit_weights_makes_fp8_of_the_largest_that_is_run_with_it():
    layers = layers_of(schemes_of("W4A8_AWQ"))
    unit = record(layers)
    stored = exporter("W4A8_AWQ", layers).tensors(unit)
    for layer in layers:
        largest = max(float(unit.quantized[name].dequantize().abs().max()) for name in layer.fused)
        assert float(stored[f"{layer.name}.weight_scale_2"]) == pytest.approx(largest / 448, rel=1e-6)


def test_scales_of_inputs_are_multiplied():
    stored = {
        case: exporter(case, layers).tensors(record(layers))
        for case in ("FP8", "NVFP4")
        for layers in [layers_of(schemes_of(case))]
    }
    name = f"{BLOCK}mlp.up_proj.input_scale"
    assert float(stored["FP8"][name]) == pytest.approx(3 / 448, rel=1e-6)
    assert float(stored["NVFP4"][name]) == pytest.approx(3 / (6 * 448), rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [
        (Scheme(replace(INT4, symmetric=False)), "bit: 4, symmetric: True"),
        (Scheme(replace(INT4, granularity=PerGroup(64))), "group_size: 128"),
        (Scheme(replace(INT4, bits=3)), "bit: 4"),
        (Scheme(replace(INT8, granularity=PerGroup(128))), "per_channel"),
        (Scheme(replace(INT8, scale_dtype=torch.float32), ActSpec(QuantSpec(8, True, PerToken()))), "per_channel}"),
        (Scheme(FP8_TENSOR, TOKEN), "per_tensor with act static"),
        (Scheme(FP8_ROWS), "per_token"),
        (Scheme(NVFP4), "act {bit: nvfp4}"),
        (Scheme(QuantSpec.floating("e2m1", PerGroup(32), MX)), "nvfp4"),
        (Scheme(QuantSpec.floating("e5m2", PerChannel()), TOKEN), "e4m3"),
        (Scheme(QuantSpec(4, False, PerCluster(4))), "per_group"),
    ],
)
def test_what_has_no_method_is_refused_with_the_nearest_that_has_one(scheme, nearest):
    with pytest.raises(ExportError, match="TensorRT-LLM has no method for") as error:
        algorithm_of(scheme)
    assert "save_trtllm" in error.value.message
    assert nearest in error.value.remedy


@pytest.mark.parametrize(
    "scheme",
    [Scheme(replace(INT4, scale_dtype=torch.float32)), Scheme(replace(FP8_TENSOR, scale_dtype=BF16), STATIC)],
)
def test_scales_that_the_loader_would_round_are_refused(scheme):
    with pytest.raises(ExportError, match="evaluated differently") as error:
        algorithm_of(scheme)
    assert "scale_dtype" in error.value.remedy


def test_linears_that_are_run_as_one_have_one_scheme():
    schemes = schemes_of("FP8") | {"self_attn.k_proj": SCHEMES["FP8_PER_CHANNEL_PER_TOKEN"]}
    layers = layers_of(schemes)
    with pytest.raises(ExportError, match="TensorRT-LLM fuses"):
        exporter("FP8", layers).check(layers)


def test_products_that_the_backend_rounds_once_more_are_told_of():
    warnings = {}
    for case in ("W4A8_AWQ", "FP8"):
        layers = layers_of(schemes_of(case))
        warnings[case] = exporter(case, layers).check(layers)
    assert warnings["FP8"] == []
    (warning,) = warnings["W4A8_AWQ"]
    assert "e4m3" in warning
