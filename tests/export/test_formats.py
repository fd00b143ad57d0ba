"""Formats are pure functions with an inverse; what a backend can't load is refused before a weight is read."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AutoQuantizationConfig

from llmc.errors import ExportError
from llmc.export import EXPORTERS, Exporter, Layer, check_shard, copy_side_files
from llmc.export.base import with_dtype
from llmc.export.dense import FakeQuant, Transformed
from llmc.export.vllm import VLLM
from llmc.quant import PerChannel, PerGroup, PerTensor, QuantSpec, UnitRecord, quantize_weight

SYM4 = QuantSpec(4, True, PerGroup(32), scale_dtype=torch.bfloat16)
ASYM4 = replace(SYM4, symmetric=False)
GRANULARITIES = [PerChannel(), PerGroup(32), PerGroup(64), PerGroup(128)]
LOADABLE = [
    QuantSpec(bits, symmetric, granularity, mode, scale_dtype=torch.bfloat16)
    for (bits, symmetric, mode), granularity in product(
        [(4, True, "restricted"), (4, True, "full"), (8, True, "gptq"), (4, False, "restricted")], GRANULARITIES
    )
]
FUSED = ("layers.0.q_proj", "layers.0.k_proj")


def exporter(kind: type[Exporter], spec: QuantSpec | None = SYM4) -> Exporter:
    return kind(spec, stored=torch.bfloat16, compute=torch.float32)


def record(spec: QuantSpec, rows: int = 16, columns: int = 256) -> UnitRecord:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(rows, columns, generator=generator) for name in FUSED}
    return UnitRecord(
        plain={"layers.0.norm.weight": torch.randn(columns, generator=generator).bfloat16()},
        quantized={name: quantize_weight(weight, spec) for name, weight in weights.items()},
    )


def layers(*specs: QuantSpec | None, rows: int = 64, columns: int = 256) -> list[Layer]:
    return [Layer(name, rows, columns, spec, FUSED) for name, spec in zip(FUSED, specs, strict=True)]


@pytest.mark.parametrize("spec", LOADABLE, ids=QuantSpec.describe)
def test_vllm_reads_back_codes_scales_and_zero_points(spec):
    unit, fmt = record(spec), exporter(VLLM, spec)
    back = fmt.read(fmt.tensors(unit))
    assert back.plain.keys() == unit.plain.keys()
    assert back.quantized.keys() == unit.quantized.keys()
    for name, weight in unit.quantized.items():
        found = back.quantized[name]
        assert found.spec == spec
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale)
        assert found.scale.dtype == torch.bfloat16
        assert found.zero is None if spec.symmetric else torch.equal(found.zero, weight.zero)


@pytest.mark.parametrize("spec", LOADABLE, ids=QuantSpec.describe)
def test_compressed_tensors_decompresses_to_the_evaluated_weight(spec):
    unit, fmt = record(spec), exporter(VLLM, spec)
    for name, weight in unit.quantized.items():
        dense = fmt.independent(fmt.tensors(unit), name)
        assert torch.equal(dense.float(), weight.dequantize())


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("columns", [40, 129])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_channels_may_have_any_shape(rows, columns, bits):
    spec = QuantSpec(bits, True, PerChannel(), scale_dtype=torch.bfloat16)
    unit, fmt = record(spec, rows, columns), exporter(VLLM, spec)
    stored = fmt.tensors(unit)
    fmt.check(layers(spec, spec, rows=rows, columns=columns))
    for name, weight in unit.quantized.items():
        assert torch.equal(fmt.read(stored).quantized[name].codes, weight.codes)
        assert torch.equal(fmt.independent(stored, name).float(), weight.dequantize())


@pytest.mark.parametrize("spec", LOADABLE, ids=QuantSpec.describe)
def test_vllm_stores_what_its_loader_asks_for(spec):
    stored, groups = exporter(VLLM, spec).tensors(record(spec)), 256 // spec.group_size(256)
    packed = 32 // spec.bits
    shapes = {
        "weight_packed": (torch.int32, (16, 256 // packed)),
        "weight_scale": (torch.bfloat16, (16, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not spec.symmetric:
        shapes["weight_zero_point"] = (torch.int32, (16 // packed, groups))
    expected = {f"{name}.{part}": found for name in FUSED for part, found in shapes.items()}
    expected["layers.0.norm.weight"] = (torch.bfloat16, (256,))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == expected


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_fake_holds_exactly_the_evaluated_weights(scale_dtype):
    spec = replace(ASYM4, scale_dtype=scale_dtype)
    unit, fmt = record(spec), exporter(FakeQuant, spec)
    back = fmt.read(fmt.tensors(unit))
    assert not back.quantized
    for name, weight in unit.quantized.items():
        assert torch.equal(back.plain[f"{name}.weight"].float(), weight.dequantize())
    assert torch.equal(back.plain["layers.0.norm.weight"], unit.plain["layers.0.norm.weight"])


def test_trans_holds_the_plain_tensors_as_they_are():
    fmt, unit = exporter(Transformed), UnitRecord(plain={"fc.weight": torch.randn(3, 4).bfloat16()})
    back = fmt.read(fmt.tensors(unit))
    assert torch.equal(back.plain["fc.weight"], unit.plain["fc.weight"])
    assert back.plain["fc.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [VLLM, FakeQuant])
@pytest.mark.parametrize("spec", LOADABLE, ids=QuantSpec.describe)
def test_the_planned_bytes_are_the_written_ones(kind, spec):
    fmt, unit = exporter(kind, spec), UnitRecord(quantized=record(spec).quantized)
    planned = sum(fmt.nbytes(layer) for layer in layers(spec, spec, rows=16))
    assert planned == sum(tensor.nbytes for tensor in fmt.tensors(unit).values())


@pytest.mark.parametrize("kind", [kind for kind in EXPORTERS if kind.stores_weights])
def test_an_ignored_linear_takes_the_bytes_of_the_original(kind):
    assert exporter(kind).nbytes(Layer("fc", 3, 5, None, ("fc",))) == 3 * 5 * 2


@pytest.mark.parametrize(
    ("spec", "problem", "remedy"),
    [
        (replace(SYM4, granularity=PerGroup(16)), "no kernel for groups of 16", "32, 64, 128"),
        (replace(SYM4, granularity=PerTensor()), "one scale per tensor", "per_channel or per_group"),
        (replace(ASYM4, bits=8), "no kernel for 8-bit weights with zero points", "symmetric: true"),
    ],
)
def test_vllm_refuses_grids_without_a_kernel_and_says_what_would_do(spec, problem, remedy):
    with pytest.raises(ExportError) as error:
        exporter(VLLM, spec).check(layers(spec, spec))
    assert "vLLM" in error.value.message
    assert "save_vllm" in error.value.message
    assert problem in error.value.message
    assert remedy in error.value.remedy
    assert "save_fake" in error.value.remedy


def test_vllm_refuses_fused_linears_with_different_grids():
    with pytest.raises(ExportError) as error:
        exporter(VLLM).check(layers(SYM4, None))
    assert "vLLM fuses layers.0.q_proj, layers.0.k_proj" in error.value.message
    assert "ignored_layers" in error.value.remedy


def test_vllm_refuses_zero_points_that_do_not_fill_a_word():
    with pytest.raises(ExportError) as error:
        exporter(VLLM, ASYM4).check(layers(ASYM4, ASYM4, rows=12))
    assert "save_vllm" in error.value.message
    assert "layers.0.q_proj: 12 rows" in error.value.message
    assert "symmetric: true" in error.value.remedy


@pytest.mark.parametrize("spec", LOADABLE, ids=QuantSpec.describe)
def test_vllm_accepts_what_it_has_fast_kernels_for_without_a_word(spec):
    assert exporter(VLLM, spec).check(layers(spec, spec)) == []
    assert exporter(VLLM, spec).check(layers(None, None, rows=3, columns=5)) == []


def test_vllm_warns_of_shapes_that_its_fastest_kernel_has_not():
    (warning,) = exporter(VLLM).check(layers(SYM4, SYM4, rows=96, columns=192))
    assert "Marlin" in warning
    assert "q_proj 96x192" in warning


@pytest.mark.parametrize("kind", [FakeQuant, Transformed])
def test_dense_formats_take_every_grid(kind):
    odd = QuantSpec(3, False, PerGroup(16))
    assert exporter(kind, odd).check(layers(odd, None, rows=3, columns=48)) == []


@pytest.mark.parametrize("spec", LOADABLE, ids=QuantSpec.describe)
def test_transformers_and_compressed_tensors_load_the_config(spec):
    config = exporter(VLLM, spec).config({"model_type": "llama", "dtype": "bfloat16"}, layers(spec, spec))
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
    quantization = config["quantization_config"]
    theirs = AutoQuantizationConfig.from_dict(dict(quantization)).quantization_config
    for loaded in (theirs, QuantizationConfig.model_validate(quantization)):
        scheme = loaded.config_groups["group_0"]
        group = spec.granularity.size if isinstance(spec.granularity, PerGroup) else None
        found = scheme.weights
        assert (found.num_bits, found.symmetric, found.dynamic) == (spec.bits, spec.symmetric, False)
        assert (found.group_size, found.strategy) == (group, "channel" if group is None else "group")
        assert scheme.targets == ["Linear"]
        assert loaded.format == "pack-quantized"


def test_vllm_runs_in_the_dtype_of_the_scales():
    other = replace(SYM4, scale_dtype=torch.float16)  # as it is where another format that is saved wants it
    found = [exporter(VLLM, spec).config({"dtype": "bfloat16"}, layers(spec, spec))["dtype"] for spec in (SYM4, other)]
    assert found == ["bfloat16", "float16"]


def test_ignored_linears_are_named_exactly():
    config = exporter(VLLM).config({}, layers(None, None))
    assert {"lm_head", *FUSED} <= set(config["quantization_config"]["ignore"])


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dense_configs_name_the_dtype_under_its_own_key_and_drop_stale_quantization(key):
    original = {"model_type": "llama", key: "bfloat16", "quantization_config": {"quant_method": "fp8"}}
    assert with_dtype(original, torch.float32) == {"model_type": "llama", key: "float32"}
    assert exporter(Transformed).config(original, []) == {"model_type": "llama", key: "bfloat16"}
    assert "quantization_config" not in exporter(FakeQuant).config(original, [])


@pytest.mark.parametrize("kind", [VLLM, FakeQuant])
def test_a_shard_as_written_passes_its_check(tmp_path, kind):
    fmt, unit = exporter(kind), record(SYM4)
    save_file(fmt.tensors(unit), tmp_path / "shard.safetensors")
    check_shard(tmp_path / "shard.safetensors", fmt, unit)


def test_a_transformed_shard_passes_its_check(tmp_path):
    fmt, unit = exporter(Transformed), UnitRecord(plain={"fc.weight": torch.ones(3, 4)})
    save_file(fmt.tensors(unit), tmp_path / "shard.safetensors")
    check_shard(tmp_path / "shard.safetensors", fmt, unit)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("layers.0.q_proj.weight_scale"), "weight_scale is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra is one too many"),
        (lambda t: t["layers.0.q_proj.weight_packed"][3].add_(1), "weight_packed holds other values"),
        (lambda t: t.update({"layers.0.norm.weight": torch.ones(256)}), r"norm.weight is torch.float32 \(256,\)"),
    ],
)
def test_a_damaged_shard_fails_its_check(tmp_path, change, problem):
    fmt, unit, path = exporter(VLLM), record(SYM4), tmp_path / "shard.safetensors"
    save_file(fmt.tensors(unit), path)
    stored = load_file(path)
    change(stored)
    save_file(stored, path)
    with pytest.raises(ExportError, match=problem) as error:
        check_shard(path, fmt, unit)
    assert str(path) in error.value.message


@pytest.mark.parametrize("reader", ["read", "independent"])
def test_a_reader_that_disagrees_fails_the_check(tmp_path, monkeypatch, reader):
    fmt, unit, path = exporter(VLLM), record(SYM4), tmp_path / "shard.safetensors"
    save_file(fmt.tensors(unit), path)
    other = UnitRecord(quantized={name: replace(w, scale=w.scale * 2) for name, w in unit.quantized.items()})
    wrong = {"read": lambda tensors: other, "independent": lambda tensors, name: torch.zeros(16, 256)}[reader]
    monkeypatch.setattr(fmt, reader, wrong)
    with pytest.raises(ExportError, match="reads back differently through"):
        check_shard(path, fmt, unit)


def test_side_files_are_copied_byte_for_byte_weights_and_configs_are_not(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = ["chat_template.jinja", "generation_config.json", "modeling_own.py", "tokenizer.json", "tokenizer.model"]
    for name in (*kept, "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (source / name).write_bytes(name.encode() + b"\r\n\xff")
    assert copy_side_files(source, target) == kept
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        name: name.encode() + b"\r\n\xff" for name in kept
    }


@pytest.mark.parametrize("kind", ["same", "another expert", "another layer"])
def test_vllm_wants_one_scheme_for_all_experts_of_a_layer(kind):
    places = [(0, 0), (0, 1), (1, 0)]
    wide = {"same": None, "another expert": (0, 1), "another layer": (1, 0)}[kind]
    specs = {place: replace(SYM4, bits=8) if place == wide else SYM4 for place in places}
    found = []
    for (layer, expert), spec in specs.items():
        for linear in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{expert}.{linear}"
            found.append(Layer(name, 64, 256, spec, (name,)))
    if kind != "another expert":
        exporter(VLLM).check(found)
        return
    with pytest.raises(ExportError, match=r"one scheme for all experts .*experts\.0\.gate_proj and .*experts\.1\.gate"):
        exporter(VLLM).check(found)
