"""compressed-tensors beyond W4A16 and W8A8: FP4 and MX, 4-bit weights with 8-bit activations, 2 and 3 bits densely."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.utils import generate_gparam
from safetensors.torch import save_file
from torch import Tensor

from llmc.errors import ExportError
from llmc.export import Layer, check_shard
from llmc.export.sglang import SGLang
from llmc.export.vllm import VLLM
from llmc.export.vllm_schemes import PACKED, scheme_of
from llmc.quant import (
    ActSpec,
    Fp8Grid,
    InputRange,
    KvSpec,
    PerBlock,
    PerChannel,
    PerCluster,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    Scheme,
    StaticMinMax,
    UnitRecord,
    quantize_weight,
)

BF16, NV, MX = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
NVFP4 = QuantSpec.floating("e2m1", PerGroup(16), NV)
MXFP4, MXFP8 = QuantSpec.floating("e2m1", PerGroup(32), MX), QuantSpec.floating("e4m3", PerGroup(32), MX)
FP8_TENSOR, FP8 = (QuantSpec.floating("e4m3", grain) for grain in (PerTensor(), PerChannel()))
INT8 = QuantSpec(8, True, PerChannel())
TOKEN8, TOKEN_FP8 = ActSpec(QuantSpec(8, True, PerToken())), ActSpec(QuantSpec.floating("e4m3", PerToken()))
STATIC_FP8 = ActSpec(QuantSpec.floating("e4m3", PerTensor()), StaticMinMax())
GROUPS_FP8 = ActSpec(QuantSpec.floating("e4m3", PerGroup(128)))


def integers(bits: int, group: int | None = None, *, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(bits, symmetric, PerChannel() if group is None else PerGroup(group), scale_dtype=BF16)


STORED = {
    "nvfp4": (Scheme(NVFP4), "nvfp4-pack-quantized"),
    "nvfp4 a4": (Scheme(NVFP4, ActSpec(NVFP4, StaticMinMax())), "nvfp4-pack-quantized"),
    "mxfp4": (Scheme(MXFP4), "mxfp4-pack-quantized"),
    "mxfp4 a4": (Scheme(MXFP4, ActSpec(MXFP4)), "mxfp4-pack-quantized"),
    "mxfp4 a8": (Scheme(MXFP4, TOKEN_FP8), "mxfp4-pack-quantized"),
    "mxfp4 a8 groups": (Scheme(MXFP4, GROUPS_FP8), "mxfp4-pack-quantized"),
    "mxfp8": (Scheme(MXFP8, ActSpec(MXFP8)), "mxfp8-quantized"),
    "w4a8 channel": (Scheme(integers(4), TOKEN8), "int-quantized"),
    "w4a8 group": (Scheme(integers(4, 32), TOKEN8), "int-quantized"),
    "w4a8 fp8": (Scheme(integers(4, 128), TOKEN_FP8), "pack-quantized"),
    "fp8 tensor": (Scheme(FP8_TENSOR, STATIC_FP8), "float-quantized"),
    "fp8 tensor, token": (Scheme(FP8_TENSOR, TOKEN_FP8), "float-quantized"),
    "fp8 tensor, weights": (Scheme(FP8_TENSOR), "float-quantized"),
    **{
        f"w{bits}{'' if symmetric else ' asym'} g{group}": (Scheme(integers(bits, group, symmetric=symmetric)), PACKED)
        for bits, group, symmetric in product((2, 3, 5, 6, 7), (None, 64), (True, False))
    },
}
FOUND = InputRange(-1.5, 3.0)
ROWS, COLUMNS = 96, 256


def exporter(scheme: Scheme, kind: type[VLLM] = VLLM) -> VLLM:
    return kind(scheme.weight, BF16, torch.float32, scheme.act)


def layer(scheme: Scheme, **changes) -> Layer:
    return replace(Layer("fc", ROWS, COLUMNS, scheme.weight, ("fc",), act=scheme.act), **changes)


def record(scheme: Scheme) -> UnitRecord:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * torch.rand(ROWS, 1, generator=generator)
    weight[3] = 0  # a row without extent
    static = scheme.act is not None and scheme.act.observer is not None
    return UnitRecord(
        plain={"norm.weight": torch.ones(COLUMNS, dtype=BF16)},
        quantized={"fc": quantize_weight(weight, scheme.weight)},
        inputs={"fc": FOUND} if static else {},
    )


def stream(codes: Tensor, bits: int) -> Tensor:
    """Words of a stream of little-endian codes along each row, written down anew."""
    unsigned = codes.numpy().astype(np.int64) + (1 << (bits - 1))
    single = (unsigned[:, :, None] >> np.arange(bits)) & 1
    single = single.reshape(len(unsigned), -1)
    padded = np.pad(single, ((0, 0), (0, -single.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32).copy())


@pytest.mark.parametrize("name", STORED)
def test_what_is_written_reads_back_and_decompresses_to_the_evaluated_weight(name, tmp_path):
    scheme, _ = STORED[name]
    unit, fmt = record(scheme), exporter(scheme)
    fmt.check([layer(scheme)])
    stored = fmt.tensors(unit)
    back = fmt.read(stored)
    weight, found = unit.quantized["fc"], back.quantized["fc"]
    assert back.plain.keys() == unit.plain.keys()
    assert found.spec == weight.spec
    assert found.codes.dtype == weight.codes.dtype
    assert torch.equal(found.codes.float(), weight.codes.float())
    assert found.scale.dtype == weight.scale.dtype
    assert torch.equal(found.scale.float(), weight.scale.float())
    assert weight.zero is None or torch.equal(found.zero, weight.zero)
    assert torch.equal(fmt.independent(stored, "fc").float(), weight.dequantize())
    save_file(stored, tmp_path / "shard.safetensors")
    check_shard(tmp_path / "shard.safetensors", fmt, unit)


@pytest.mark.parametrize("name", STORED)
def test_the_planned_bytes_are_the_written_ones(name):
    scheme, _ = STORED[name]
    fmt = exporter(scheme)
    stored = fmt.tensors(record(scheme))
    written = sum(tensor.nbytes for key, tensor in stored.items() if key.startswith("fc."))
    assert fmt.nbytes(layer(scheme)) == written


@pytest.mark.parametrize("name", STORED)
def test_the_library_packs_the_evaluated_weight_to_the_very_same_tensors(name):
    scheme, _ = STORED[name]
    weight = record(scheme).quantized["fc"]
    stored = {k.removeprefix("fc."): v for k, v in exporter(scheme).tensors(record(scheme)).items() if k[:3] == "fc."}
    theirs = scheme_of(scheme.weight, scheme.act)
    scale = weight.scale if weight.spec.grid == "int" else weight.scale.float()
    state = {"weight": weight.dequantize(), "weight_scale": scale.reshape(1) if scale.numel() == 1 else scale}
    state |= {} if weight.zero is None else {"weight_zero_point": weight.zero}
    state |= {key: stored[key] for key in ("weight_global_scale",) if key in stored}
    found = BaseCompressor.get_value_from_registry(theirs.format).compress(state, theirs)
    assert {key for key in stored if not key.startswith("input_")} == found.keys()
    for key, tensor in found.items():
        ours = stored[key]
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape), key
        if key == "weight_packed" and weight.spec.grid == "e2m1":  # which sign a zero has is of no account
            assert torch.equal(FP4[nibbles(ours)], FP4[nibbles(tensor)])
        else:
            assert torch.equal(ours.float(), tensor.float()), key


def nibbles(packed: Tensor) -> Tensor:
    """Codes of FP4 pairs, the low half first."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).long()


@pytest.mark.parametrize("name", [name for name in STORED if STORED[name][0].weight.grid == "e2m1"])
def test_pairs_of_fp4_decode_by_the_table(name):
    scheme, _ = STORED[name]
    weight = record(scheme).quantized["fc"]
    stored = exporter(scheme).tensors(record(scheme))
    codes = FP4[nibbles(stored["fc.weight_packed"])]
    scale = stored["fc.weight_scale"]
    if scheme.weight.is_nvfp4:
        scale = scale.float() / stored["fc.weight_global_scale"]
    else:
        scale = torch.exp2(scale.float() - 127)
    size = scheme.weight.group_size(COLUMNS)
    assert torch.equal(codes * scale.repeat_interleave(size, dim=1), weight.dequantize())


@pytest.mark.parametrize("name", [name for name in STORED if STORED[name][1] == "pack-quantized"])
def test_codes_and_zero_points_are_dense_streams_of_bits(name):
    scheme, _ = STORED[name]
    weight = record(scheme).quantized["fc"]
    stored = exporter(scheme).tensors(record(scheme))
    assert torch.equal(stored["fc.weight_packed"], stream(weight.codes, scheme.weight.bits))
    if weight.zero is not None:
        assert torch.equal(stored["fc.weight_zero_point"], stream(weight.zero.T, scheme.weight.bits).T)


@pytest.mark.parametrize("name", STORED)
def test_tensors_have_the_names_shapes_and_dtypes_that_the_loader_asks_for(name):
    scheme, stored_as = STORED[name]
    spec, groups = scheme.weight, COLUMNS // scheme.weight.group_size(COLUMNS)
    whole, bits = (torch.float32, (1,)), scheme.weight.bits
    expected = {
        "nvfp4-pack-quantized": {
            "weight_packed": (torch.uint8, (ROWS, COLUMNS // 2)),
            "weight_scale": (NV, (ROWS, COLUMNS // 16)),
            "weight_global_scale": whole,
        },
        "mxfp4-pack-quantized": {
            "weight_packed": (torch.uint8, (ROWS, COLUMNS // 2)),
            "weight_scale": (torch.uint8, (ROWS, COLUMNS // 32)),
        },
        "mxfp8-quantized": {"weight": (NV, (ROWS, COLUMNS)), "weight_scale": (torch.uint8, (ROWS, COLUMNS // 32))},
        "int-quantized": {"weight": (torch.int8, (ROWS, COLUMNS)), "weight_scale": (BF16, (ROWS, groups))},
        "float-quantized": {"weight": (NV, (ROWS, COLUMNS)), "weight_scale": whole},
        "pack-quantized": {
            "weight_packed": (torch.int32, (ROWS, COLUMNS * bits // 32)),
            "weight_scale": (BF16, (ROWS, groups)),
            "weight_shape": (torch.int64, (2,)),
        },
    }[stored_as]
    expected |= {} if spec.symmetric else {"weight_zero_point": (torch.int32, (ROWS * bits // 32, groups))}
    expected |= {"input_global_scale": whole} if name == "nvfp4 a4" else {}
    expected |= {"input_scale": whole} if name == "fp8 tensor" else {}
    stored = exporter(scheme).tensors(record(scheme))
    assert {k[3:]: (t.dtype, tuple(t.shape)) for k, t in stored.items() if k.startswith("fc.")} == expected


def test_the_global_scale_of_inputs_is_that_of_their_calibrated_range():
    scheme, _ = STORED["nvfp4 a4"]
    stored = exporter(scheme).tensors(record(scheme))["fc.input_global_scale"]
    theirs = generate_gparam(torch.tensor([FOUND.lo]), torch.tensor([FOUND.hi]))
    assert float(stored) == pytest.approx(float(theirs), rel=2e-7)
    assert float(stored) == pytest.approx(448 * 6 / 3, rel=2e-7)


@pytest.mark.parametrize("name", STORED)
def test_the_config_says_what_is_stored(name):
    scheme, stored_as = STORED[name]
    content = exporter(scheme).config({"model_type": "llama"}, [layer(scheme)])["quantization_config"]
    loaded = QuantizationConfig.model_validate(content)
    found = loaded.config_groups["group_0"]
    assert loaded.format == found.format == stored_as
    assert {"lm_head", r"re:.*mlp\.gate$"} <= set(loaded.ignore)
    for grid, given in ((scheme.weight, found.weights), (scheme.act and scheme.act.grid, found.input_activations)):
        if grid is None:
            assert given is None
            continue
        assert (given.num_bits, given.symmetric) == (grid.bits, grid.symmetric)
        assert given.type == ("int" if grid.grid == "int" else "float")
        assert given.group_size == (grid.granularity.size if isinstance(grid.granularity, PerGroup) else None)
        assert given.scale_dtype == (torch.uint8 if grid.is_mx else NV if grid.is_nvfp4 else None)
        assert (given.strategy == "tensor_group") == grid.is_nvfp4
    if scheme.act is not None:
        dynamic = "local" if scheme.act.grid.is_nvfp4 else scheme.act.observer is None
        assert found.input_activations.dynamic == dynamic


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        ("w3 g64", "humming"),
        ("w2 asym gNone", "humming"),
        ("w4a8 group", "CPUs"),
        ("w4a8 fp8", "Hopper"),
        ("nvfp4 a4", "Blackwell"),
        ("mxfp8", "Blackwell"),
        ("mxfp4", "rounds to MXFP4"),
        ("mxfp4 a8", "Blackwell"),
        ("nvfp4", None),
        ("fp8 tensor", None),
    ],
)
def test_what_runs_only_under_a_condition_is_told(name, condition):
    scheme, _ = STORED[name]
    warnings = exporter(scheme).check([layer(scheme, rows=128)])
    assert len(warnings) == (condition is not None)
    assert all(condition in warning and "save_vllm" in warning for warning in warnings)


CLUSTERS = QuantSpec(4, False, PerCluster(4))


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [
        (Scheme(NVFP4, ActSpec(MXFP4)), "act {bit: nvfp4}"),
        (Scheme(NVFP4, TOKEN_FP8), "act {bit: nvfp4}"),
        (Scheme(MXFP8), "act {bit: mxfp8}"),
        (Scheme(MXFP8, TOKEN_FP8), "act {bit: mxfp8}"),
        (Scheme(MXFP4, ActSpec(MXFP8)), "act {bit: mxfp4}"),
        (Scheme(MXFP4, TOKEN8), "act {bit: mxfp4}"),
        (Scheme(FP8, ActSpec(MXFP8)), "e4m3"),
        (Scheme(QuantSpec.floating("e2m1", PerGroup(32))), "nvfp4"),
        (Scheme(QuantSpec.floating("e5m2", PerChannel())), "e4m3"),
        (Scheme(QuantSpec.floating("e4m3", PerBlock(64)), GROUPS_FP8), "128"),
        (Scheme(integers(4, 64), TOKEN_FP8), "group_size: 128"),
        (Scheme(integers(4, symmetric=False), TOKEN8), "symmetric: True"),
        (Scheme(integers(3), TOKEN8), "bit: 8"),
        (Scheme(INT8, TOKEN_FP8), "e4m3"),
    ],
)
def test_vllm_refuses_what_it_has_no_kernel_for_and_names_the_nearest(scheme, nearest):
    with pytest.raises(ExportError, match="vLLM has no kernel for") as error:
        exporter(scheme).check([layer(scheme)])
    assert nearest in error.value.remedy
    assert "save_vllm" in error.value.message


def test_scales_of_four_bit_weights_that_vllm_would_round_are_refused():
    scheme = Scheme(replace(integers(4), scale_dtype=torch.float32), TOKEN8)
    with pytest.raises(ExportError, match="16 bits") as error:
        exporter(scheme).check([layer(scheme)])
    assert "scale_dtype" in error.value.remedy


@pytest.mark.parametrize(("bits", "rows"), [(2, 24), (3, 40), (4, 12), (6, 24)])
def test_zero_points_fill_their_words(bits, rows):
    scheme = Scheme(integers(bits, 64, symmetric=False))
    with pytest.raises(ExportError, match=f"{rows} rows of zero points"):
        exporter(scheme).check([layer(scheme, rows=rows)])


RUN_BY_SGLANG = {
    "w4": Scheme(integers(4, 128)),
    "w4 asym": Scheme(integers(4, 64, symmetric=False)),
    "w8": Scheme(integers(8)),
    "w8a8": Scheme(INT8, TOKEN8),
    "fp8": Scheme(FP8, TOKEN_FP8),
    "fp8 static": Scheme(FP8, STATIC_FP8),
    "fp8 blocks": Scheme(QuantSpec.floating("e4m3", PerBlock(128)), GROUPS_FP8),
    "fp8 tensor": Scheme(FP8_TENSOR, STATIC_FP8),
    "fp8 weights": Scheme(FP8),
    "nvfp4": Scheme(NVFP4, ActSpec(NVFP4, StaticMinMax())),
}


@pytest.mark.parametrize("name", RUN_BY_SGLANG)
def test_sglang_gets_the_tensors_and_the_config_that_vllm_gets(name, tmp_path):
    scheme = RUN_BY_SGLANG[name]
    ours, vllm = exporter(scheme, SGLang), exporter(scheme)
    layers, unit = [layer(scheme, rows=128)], record(scheme)
    assert len(ours.check(layers)) == (name == "nvfp4")
    assert ours.config({}, layers) == vllm.config({}, layers)
    stored, theirs = ours.tensors(unit), vllm.tensors(unit)
    assert stored.keys() == theirs.keys()
    assert all(torch.equal(stored[key].float(), theirs[key].float()) for key in stored)
    save_file(stored, tmp_path / "shard.safetensors")
    check_shard(tmp_path / "shard.safetensors", ours, unit)
    assert ours.serve(tmp_path) == f"python -m sglang.launch_server --model-path {tmp_path}"
    cache = KvSpec("Naive", Fp8Grid(torch.float8_e4m3fn), PerTensor(), static=True)
    cached = SGLang(scheme.weight, BF16, torch.float32, scheme.act, cache)
    assert cached.serve(tmp_path).endswith(" --kv-cache-dtype fp8_e4m3")


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [
        (Scheme(integers(3, 128)), "bit: 4"),
        (Scheme(INT8, ActSpec(QuantSpec(8, False, PerToken()))), "symmetric: True, granularity: per_token"),
        (Scheme(INT8, ActSpec(QuantSpec(8, True, PerTensor()), StaticMinMax())), "per_token"),
        (Scheme(integers(4, 32), TOKEN8), "bit: 8"),
        (Scheme(NVFP4), "act {bit: nvfp4}"),
        (Scheme(MXFP4), "nvfp4"),
        (Scheme(MXFP8, ActSpec(MXFP8)), "e4m3"),
        (Scheme(CLUSTERS), "bit: 4"),
    ],
)
def test_sglang_refuses_what_it_would_run_otherwise(scheme, nearest):
    with pytest.raises(ExportError, match="SGLang doesn't run") as error:
        exporter(scheme, SGLang).check([layer(scheme)])
    assert "save_sgl" in error.value.message
    assert nearest in error.value.remedy


def test_sglang_reads_one_format_for_all_layers():
    kinds = [RUN_BY_SGLANG["w4"], RUN_BY_SGLANG["w8a8"]]
    layers = [layer(kind, name=f"fc{index}", fused=(f"fc{index}",)) for index, kind in enumerate(kinds)]
    fmt = SGLang(kinds[0].weight, BF16, torch.float32, None, None, {"fc1": kinds[1]})
    with pytest.raises(ExportError, match="one format for all layers") as error:
        fmt.check(layers)
    assert "int-quantized and pack-quantized" in error.value.message
    layers = [layers[0], layer(RUN_BY_SGLANG["w8"], name="fc1", fused=("fc1",))]
    fmt = SGLang(kinds[0].weight, BF16, torch.float32, None, None, {"fc1": RUN_BY_SGLANG["w8"]})
    assert "Marlin" in fmt.check(layers)[0]


@pytest.mark.parametrize(("kind", "name"), [(VLLM, "vLLM"), (SGLang, "SGLang")])
def test_messages_name_the_backend(kind, name):
    spec = integers(4, 64)
    pair = [layer(Scheme(spec), name=n, fused=("q", "k")) for n in ("q", "k")]
    with pytest.raises(ExportError, match=f"{name} fuses q, k"):
        exporter(Scheme(spec), kind).check([pair[0], replace(pair[1], spec=None)])
