"""AutoAWQ's and GPTQ's words: unpacked here nibble by nibble from their descriptions, and by another library."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmc.errors import ExportError
from llmc.export import Exporter, Layer, check_shard
from llmc.export.autoawq import MLCLLM, AutoAWQ
from llmc.export.autogptq import AutoGPTQ
from llmc.quant import (
    ActSpec,
    Fp8Grid,
    KvSpec,
    PerBlock,
    PerChannel,
    PerCluster,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    QWeight,
    UnitRecord,
    quantize_weight,
)

ROWS, COLUMNS = 16, 256
SYM4 = QuantSpec(4, True, PerGroup(128), scale_dtype=torch.float16)
ASYM4, SYM8 = replace(SYM4, symmetric=False), replace(SYM4, bits=8)
GRAINS = [PerGroup(32), PerGroup(64), PerGroup(128), PerChannel()]
AWQ_SPECS = [replace(spec, granularity=grain) for spec, grain in product((SYM4, ASYM4), GRAINS)]
AWQ_SPECS += [replace(SYM4, sym_mode="full"), replace(SYM4, sym_mode="gptq")]
GPTQ_SPECS = [replace(spec, granularity=grain) for spec, grain in product((SYM4, SYM8), GRAINS)]
STORED = [(AutoAWQ, spec) for spec in AWQ_SPECS] + [(AutoGPTQ, spec) for spec in GPTQ_SPECS]
STORED += [(MLCLLM, SYM4), (MLCLLM, ASYM4)]
IDS = [f"{kind.name} {spec.describe()} {spec.sym_mode}" for kind, spec in STORED]
Q, K, OUT = "model.layers.1.attn.q_proj", "model.layers.1.attn.k_proj", "model.layers.1.attn.o_proj"


def exporter(kind: type[Exporter], spec: QuantSpec | None, **more: Any) -> Exporter:
    return kind(spec, torch.bfloat16, torch.float32, **more)


def quantized(spec: QuantSpec, rows: int = ROWS, columns: int = COLUMNS) -> QWeight:
    """Rows of very different magnitudes, and codes at both ends."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    return quantize_weight(weight, spec)


def record(spec: QuantSpec) -> UnitRecord:
    return UnitRecord(plain={"fc.bias": torch.ones(ROWS).bfloat16()}, quantized={"fc": quantized(spec)})


def layers(spec: QuantSpec | None, *rest: QuantSpec | None, rows: int = 64, columns: int = COLUMNS) -> list[Layer]:
    """q, k and o of one block: q and k are fused."""
    q, k, o = (spec, *rest, *(spec for _ in range(2 - len(rest))))
    return [
        Layer(Q, rows, columns, q, (Q, K)),
        Layer(K, rows, columns, k, (Q, K)),
        Layer(OUT, rows, columns, o, (OUT,)),
    ]


def field(word: Tensor, bits: int, place: int) -> int:
    """``bits`` bits of a word, the ``place``-th from below."""
    return (int(word) >> (bits * place)) & ((1 << bits) - 1)


def awq_by_hand(stored: dict[str, Tensor]) -> Tensor:
    """The weight ``[out, in]`` from AutoAWQ's description: column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i] is nibble i."""
    words, zeros, scales = (stored[f"fc.{part}"] for part in ("qweight", "qzeros", "scales"))
    columns, rows = words.shape[0], scales.shape[1]
    group = columns // scales.shape[0]
    dense = torch.empty(rows, columns, dtype=torch.float16)
    for k, o in product(range(columns), range(rows)):
        place = (0, 2, 4, 6, 1, 3, 5, 7).index(o % 8)
        code, zero = field(words[k, o // 8], 4, place), field(zeros[k // group, o // 8], 4, place)
        dense[o, k] = (code - zero) * scales[k // group, o]
    return dense


def gptq_by_hand(stored: dict[str, Tensor], bits: int) -> Tensor:
    """The weight ``[out, in]`` from the description of version 1, whose readers add 1 to the stored zero point."""
    words, zeros, scales, groups = (stored[f"fc.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    in_word, columns, rows = 32 // bits, groups.numel(), scales.shape[1]
    dense = torch.empty(rows, columns, dtype=torch.float16)
    for k, o in product(range(columns), range(rows)):
        group = int(groups[k])
        code = field(words[k // in_word, o], bits, k % in_word)
        zero = field(zeros[group, o // in_word], bits, o % in_word) + 1
        dense[o, k] = (code - zero) * scales[group, o]
    return dense


@pytest.mark.parametrize("spec", AWQ_SPECS, ids=lambda spec: f"{spec.describe()} {spec.sym_mode}")
def test_awq_words_unpacked_by_hand_are_the_evaluated_weight(spec):
    unit = record(spec)
    dense = awq_by_hand(exporter(AutoAWQ, spec).tensors(unit))
    assert torch.equal(dense.float(), unit.quantized["fc"].dequantize())


@pytest.mark.parametrize("spec", GPTQ_SPECS, ids=QuantSpec.describe)
def test_gptq_words_unpacked_by_hand_are_the_evaluated_weight(spec):
    unit = record(spec)
    dense = gptq_by_hand(exporter(AutoGPTQ, spec).tensors(unit), spec.bits)
    assert torch.equal(dense.float(), unit.quantized["fc"].dequantize())


@pytest.mark.parametrize("spec", AWQ_SPECS, ids=lambda spec: f"{spec.describe()} {spec.sym_mode}")
def test_compressed_tensors_converts_awq_to_the_evaluated_weight(spec):
    unit, fmt = record(spec), exporter(AutoAWQ, spec)
    dense = fmt.independent(fmt.tensors(unit), "fc")
    assert dense.dtype == torch.float16
    assert torch.equal(dense.float(), unit.quantized["fc"].dequantize())
    assert fmt.independent({"fc.weight": torch.ones(1)}, "fc") is None


def test_single_words_are_as_described():
    ones = torch.ones(8, 1, dtype=torch.float16)
    eight = QWeight(torch.arange(-8, 0, dtype=torch.int8)[:, None].expand(8, 8), ones, ones.char(), ASYM4)
    awq = exporter(AutoAWQ, ASYM4).tensors(UnitRecord(quantized={"fc": eight}))
    assert awq["fc.qweight"].tolist() == [[0x75316420]] * 8
    assert awq["fc.qzeros"].tolist() == [[0x99999999 - 2**32]]
    spec = replace(SYM4, granularity=PerChannel())
    rows = QWeight(torch.arange(-8, 0, dtype=torch.int8)[None].expand(8, 8), ones, None, spec)
    gptq = exporter(AutoGPTQ, spec).tensors(UnitRecord(quantized={"fc": rows}))
    assert gptq["fc.qweight"].tolist() == [[0x76543210] * 8]
    assert gptq["fc.qzeros"].tolist() == [[0x77777777]]


@pytest.mark.parametrize(("bits", "word"), [(4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zero_points_are_the_middle_of_the_codes(bits, word):
    assert set(exporter(AutoAWQ, SYM4).tensors(record(SYM4))["fc.qzeros"].flatten().tolist()) == {0x88888888 - 2**32}
    spec = replace(SYM4, bits=bits)
    assert set(exporter(AutoGPTQ, spec).tensors(record(spec))["fc.qzeros"].flatten().tolist()) == {word}


@pytest.mark.parametrize(("kind", "spec"), STORED, ids=IDS)
def test_a_record_reads_back_as_it_was(kind, spec):
    unit, fmt = record(spec), exporter(kind, spec)
    back = fmt.read(fmt.tensors(unit))
    assert back.plain.keys() == {"fc.bias"}
    found, weight = back.quantized["fc"], unit.quantized["fc"]
    assert found.spec == spec
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scale, weight.scale)
    assert found.scale.dtype == torch.float16
    assert found.zero is None if spec.symmetric else torch.equal(found.zero, weight.zero)


@settings(max_examples=30)
@given(rows=st.integers(1, 5), words=st.integers(2, 6), bits=st.sampled_from([4, 8]), seed=st.integers(0, 10**6))
def test_any_codes_in_any_shape_that_fills_words_come_back(rows, words, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = rows * 8, words * 8
    spec = QuantSpec(bits, True, PerChannel(), scale_dtype=torch.float16)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (rows, columns), generator=generator, dtype=torch.int8)
    weight = QWeight(codes, torch.rand(rows, 1, generator=generator).half(), None, spec)
    for kind in (AutoGPTQ, *([AutoAWQ] if bits == 4 else [])):
        fmt = exporter(kind, spec)
        stored = fmt.tensors(UnitRecord(quantized={"fc": weight}))
        assert torch.equal(fmt.read(stored).quantized["fc"].codes, codes)
        assert sum(tensor.nbytes for tensor in stored.values()) == fmt.nbytes(Layer("fc", rows, columns, spec, ("fc",)))


@pytest.mark.parametrize(("kind", "spec"), STORED, ids=IDS)
def test_tensors_are_what_loaders_allocate_and_their_size_is_known(kind, spec):
    fmt, groups, in_word = exporter(kind, spec), COLUMNS // spec.group_size(COLUMNS), 32 // spec.bits
    along = (COLUMNS // in_word, ROWS) if kind is AutoGPTQ else (COLUMNS, ROWS // in_word)
    expected = {
        "fc.qweight": (torch.int32, along),
        "fc.qzeros": (torch.int32, (groups, ROWS // in_word)),
        "fc.scales": (torch.float16, (groups, ROWS)),
    }
    if kind is AutoGPTQ:
        expected["fc.g_idx"] = (torch.int32, (COLUMNS,))
    stored = fmt.tensors(record(spec))
    bias = stored.pop("fc.bias")
    assert bias.dtype == torch.bfloat16
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == expected
    size = sum(tensor.nbytes for tensor in stored.values())
    assert size == fmt.nbytes(Layer("fc", ROWS, COLUMNS, spec, ("fc",)))


@pytest.mark.parametrize(("kind", "spec"), STORED, ids=IDS)
def test_what_it_stores_is_accepted_without_a_word(kind, spec):
    assert exporter(kind, spec).check(layers(spec)) == []


REFUSED = [
    ("*", replace(SYM4, bits=3), "of 4", "bit: 4"),
    ("*", QuantSpec.floating("e4m3", PerChannel()), "W8 e4m3", "bit: 4"),
    ("*", replace(SYM4, granularity=PerGroup(16)), "W4 g16 sym", "group_size: "),
    ("*", replace(SYM4, granularity=PerTensor()), "W4 tensor sym", "per_group"),
    ("*", replace(SYM4, granularity=PerBlock(128)), "W4 block128 sym", "per_group"),
    ("*", replace(SYM4, granularity=PerCluster(4)), "W4 cluster sym", "per_group"),
    ("*", replace(SYM4, scale_dtype=torch.bfloat16), "scales in float16", "scale_dtype: float16"),
    ("awq", SYM8, "integers of 4 bits", "bit: 4"),
    ("mlc", replace(SYM4, granularity=PerGroup(64)), "each group of 128", "group_size: 128"),
    ("mlc", replace(SYM4, granularity=PerChannel()), "each group of 128", "group_size: 128"),
    ("gptq", ASYM4, "refuse zero points", "save_autoawq"),
]
KINDS = {"awq": AutoAWQ, "mlc": MLCLLM, "gptq": AutoGPTQ}
REFUSALS = [(KINDS[name], *rest) for who, *rest in REFUSED for name in KINDS if who in ("*", name)]


@pytest.mark.parametrize(("kind", "spec", "problem", "remedy"), REFUSALS)
def test_other_grids_are_refused_with_the_nearest(kind, spec, problem, remedy):
    with pytest.raises(ExportError) as error:
        exporter(kind, spec).check(layers(spec))
    assert kind.name in error.value.message
    assert problem in error.value.message
    assert remedy in error.value.remedy


@pytest.mark.parametrize("kind", KINDS.values())
def test_activations_a_cache_and_nothing_at_all_are_refused(kind):
    token = ActSpec(QuantSpec(8, True, PerToken()))
    acting = [replace(layer, act=token) for layer in layers(SYM4)]
    kv = KvSpec("Naive", Fp8Grid(torch.float8_e4m3fn, torch.float32), PerTensor(), 0, static=True)
    for fmt, shown, said in (
        (exporter(kind, SYM4, act=token), acting, "quant.act asks for A8 token sym"),
        (exporter(kind, SYM4, kv=kv), layers(SYM4), "quant.kvcache"),
        (exporter(kind, None), layers(None), "quantizes none"),
    ):
        with pytest.raises(ExportError, match=f"{kind.name}.*{said}") as error:
            fmt.check(shown)
        assert "write save_" in error.value.remedy


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize(("rows", "columns"), [(60, 128), (4, 128), (12, 128)])
def test_rows_that_do_not_fill_a_word_are_refused_by_name(kind, rows, columns):
    with pytest.raises(ExportError, match=re.escape(f"{Q}: {rows} x {columns}")):
        exporter(kind, SYM4).check(layers(SYM4, rows=rows, columns=columns))


def test_columns_that_do_not_fill_a_word_are_refused_by_name():
    spec = replace(SYM4, granularity=PerChannel())
    with pytest.raises(ExportError, match=re.escape(f"{Q}: 64 x 250")):
        exporter(AutoGPTQ, spec).check(layers(spec, rows=64, columns=250))


@pytest.mark.parametrize("kind", [AutoAWQ, AutoGPTQ])
def test_half_of_a_fused_pair_is_refused_and_a_whole_one_is_ignored(kind):
    with pytest.raises(ExportError, match=f"fuses {Q}, {K}, but .* have different schemes") as error:
        exporter(kind, SYM4).check(layers(SYM4, None))
    assert "ignored_layers" in error.value.remedy
    (warning,) = exporter(kind, SYM4).check(layers(None, None, SYM4))
    assert Q in warning
    assert "SGLang" in warning
    assert exporter(kind, SYM4).check(layers(SYM4, SYM4, None)) == []


def test_mlc_takes_no_ignored_linear_and_no_bias():
    with pytest.raises(ExportError, match=f"{OUT} isn't quantized") as error:
        exporter(MLCLLM, SYM4).check(layers(SYM4, SYM4, None))
    assert "ignored_layers" in error.value.remedy
    with pytest.raises(ExportError, match=f"{Q} has a bias") as error:
        exporter(MLCLLM, SYM4).check([replace(layer, biased=True) for layer in layers(SYM4)])
    assert "save_autoawq" in error.value.remedy
    assert exporter(AutoAWQ, SYM4).check([replace(layer, biased=True) for layer in layers(SYM4)]) == []


def test_a_name_that_is_part_of_a_quantized_one_is_not_ignored():
    gate, fused = "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj"
    shown = [Layer(gate, 64, COLUMNS, None, (gate,)), Layer(fused, 64, COLUMNS, SYM4, (fused,))]
    with pytest.raises(ExportError, match=f"{gate} isn't quantized, and loaders would leave {fused}"):
        exporter(AutoAWQ, SYM4).check(shown)
    assert exporter(AutoGPTQ, SYM4).check(shown) == []


@pytest.mark.parametrize("spec", AWQ_SPECS, ids=lambda spec: f"{spec.describe()} {spec.sym_mode}")
def test_the_awq_config_is_what_loaders_read(spec):
    stale = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}
    group = -1 if spec.granularity == PerChannel() else spec.granularity.size
    config = exporter(AutoAWQ, spec).config(stale, layers(spec))
    assert config["dtype"] == "float16"
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    ignoring = exporter(AutoAWQ, spec).config(stale, layers(None, None, spec))["quantization_config"]
    assert ignoring["modules_to_not_convert"] == [Q, K]


@pytest.mark.parametrize("spec", GPTQ_SPECS, ids=QuantSpec.describe)
def test_the_gptq_config_is_what_loaders_read(spec):
    group = -1 if spec.granularity == PerChannel() else spec.granularity.size
    config = exporter(AutoGPTQ, spec).config({"torch_dtype": "bfloat16"}, layers(spec))
    quantization = config["quantization_config"]
    assert config["torch_dtype"] == "float16"
    assert (quantization["quant_method"], quantization["checkpoint_format"]) == ("gptq", "gptq")
    assert (quantization["bits"], quantization["group_size"]) == (spec.bits, group)
    assert (quantization["sym"], quantization["desc_act"], quantization["lm_head"]) == (True, False, False)
    assert "dynamic" not in quantization
    dynamic = exporter(AutoGPTQ, spec).config({}, layers(None, None, spec))["quantization_config"]["dynamic"]
    left = [name for name in (Q, K, OUT, f"{Q}2", Q.replace(".", "x")) if any(re.match(p[2:], name) for p in dynamic)]
    assert left == [Q, K]
    assert {pattern[:2] for pattern in dynamic} == {"-:"}


def test_mlc_is_told_how_to_convert_the_shards(tmp_path):
    command = exporter(MLCLLM, SYM4).serve(tmp_path)
    assert f"--source-format awq --source {tmp_path}/model.safetensors.index.json" in command
    assert "mlc_llm compile" in command
    assert command.count("--quantization q4f16_autoawq") == 2


@pytest.mark.parametrize(("kind", "spec"), STORED, ids=IDS)
def test_a_shard_passes_its_check_and_one_flipped_bit_fails_it(tmp_path, kind, spec):
    fmt, unit, path = exporter(kind, spec), record(spec), tmp_path / "shard.safetensors"
    save_file(fmt.tensors(unit), path)
    check_shard(path, fmt, unit)
    stored = load_file(path)
    stored["fc.qweight"][3, 1] ^= 1 << 17
    save_file(stored, path)
    with pytest.raises(ExportError, match=r"fc\.qweight holds other values"):
        check_shard(path, fmt, unit)


def test_a_reader_that_disagrees_fails_the_check(tmp_path, monkeypatch):
    fmt, unit, path = exporter(AutoAWQ, SYM4), record(SYM4), tmp_path / "shard.safetensors"
    save_file(fmt.tensors(unit), path)
    monkeypatch.setattr("llmc.export.word_layouts._ORDER", range(8))
    save_file(fmt.tensors(unit), path)
    with pytest.raises(ExportError, match="fc reads back differently through"):
        check_shard(path, fmt, unit)
