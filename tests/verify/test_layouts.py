"""What other tools write is understood: compressed-tensors' own presets, AWQ, GPTQ, FP8, mixtures of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from folders import change, edit_json, linears_of, swap, tensors_of, write_folder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import llmc.verify.words
from llmc.export import Exporter, read_config
from llmc.quant import QWeight, UnitRecord
from llmc.verify import verify

PRESETS = ["W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W5A16", "W8A16", "W8A8", "INT8", "W4A8", "FP8", "FP8_DYNAMIC"]
PRESETS += ["FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8"]
CODES = ("weight", "weight_packed")


def preset(name: str) -> QuantizationScheme:
    """The library's, with groups that fit a tiny model."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    for args in (scheme.weights, scheme.input_activations):
        if args is not None and args.group_size == 128:
            args.group_size = 32
    scheme.format = infer_module_format(nn.Linear, scheme)
    return scheme


def compressed(weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """A weight by the library's own compressor, with scales of any kind."""
    args, (rows, columns) = scheme.weights, weight.shape
    shapes = {"channel": (rows, 1), "tensor": (1,), "block": (1, 1)}
    shape = shapes.get(str(args.strategy), (rows, columns // (args.group_size or columns)))
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.05 + 0.05
    parts = {"weight": weight.float(), "weight_scale": scale}
    if args.scale_dtype == torch.uint8:
        parts["weight_scale"] = torch.exp2(torch.full(shape, -4.0))
    if str(args.strategy) == "tensor_group":
        parts |= {"weight_scale": (scale * 1000).round(), "weight_global_scale": torch.tensor([1000.0])}
    if not args.symmetric:
        parts["weight_zero_point"] = torch.ones(shape, dtype=torch.int8)
    inputs = scheme.input_activations
    if inputs is not None and inputs.dynamic is False:
        parts["input_scale"] = torch.tensor([0.1])
    elif inputs is not None and inputs.dynamic is not True:
        parts["input_global_scale"] = torch.tensor([20.0])
    stored = BaseCompressor.get_value_from_registry(scheme.format).compress(parts, scheme)
    return {name: tensor.detach() for name, tensor in stored.items()}


def by_library(source: Path, target: Path, scheme: QuantizationScheme) -> Path:
    """A folder that holds nothing of llmc's making."""
    tensors = tensors_of(source)
    stored = {name: tensor for name, tensor in tensors.items() if not name.endswith("_proj.weight")}
    for name in linears_of(tensors):
        stored |= {f"{name}.{part}": tensor for part, tensor in compressed(tensors[f"{name}.weight"], scheme).items()}
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format, quantization_status="compressed", ignore=["lm_head"]
    )
    return write_folder(target, stored, read_config(source) | {"quantization_config": config.model_dump(mode="json")})


@pytest.mark.parametrize("name", PRESETS)
def test_the_librarys_own_formats_are_clean_until_they_are_damaged(checkpoint, tmp_path, name):
    folder = by_library(checkpoint("llama").folder, tmp_path / "folder", preset(name))
    report = verify(folder)
    assert ([str(finding) for finding in report.findings], report.unjudged) == ([], "")
    assert "28 of 30 Linears and embeddings quantized" in report.checked[1]
    linear = "model.layers.0.mlp.up_proj"
    parts = [part for part in tensors_of(folder) if part.startswith(f"{linear}.")]
    for part in parts:
        change(folder, part, lambda tensor: tensor.to(torch.complex64) if tensor.ndim else tensor[None, None, None])
    found = {finding.tensor for finding in verify(folder).findings}
    assert found == set(parts)


@pytest.mark.parametrize("name", ["W4A16", "FP8_BLOCK", "NVFP4", "MXFP4"])
def test_what_the_library_decompresses_is_what_is_compared(checkpoint, tmp_path, name):
    source, scheme = checkpoint("llama").folder, preset(name)
    folder = by_library(source, tmp_path / "folder", scheme)
    tensors = tensors_of(source)
    for linear in linears_of(tensors):
        parts = compressed(tensors[f"{linear}.weight"], scheme)
        dense = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
        tensors[f"{linear}.weight"] = dense.float()
    twin = write_folder(tmp_path / "twin", tensors, read_config(source))
    assert "28 of 28 weights equal bit for bit" in verify(folder, twin).checked[4]
    codes = next(part for part in CODES if f"model.layers.0.mlp.up_proj.{part}" in tensors_of(folder))
    swap(folder, f"model.layers.0.mlp.up_proj.{codes}", f"model.layers.1.mlp.up_proj.{codes}")
    report = verify(folder, twin)
    assert {finding.tensor for finding in report.findings} == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}


# --- words ---------------------------------------------------------------------------------------------------------


def packed(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Unsigned nibbles ``[n, 8 * words]`` to words, nibble ``i`` holding column ``order[i]`` of eight."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(order):
        words |= codes[:, column::8].long() << (4 * nibble)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


AWQ_ORDER, PLAIN_ORDER = (0, 2, 4, 6, 1, 3, 5, 7), tuple(range(8))


def words_folder(source: Path, target: Path, method: str) -> Path:
    """AWQ's or GPTQ's layout of random codes in groups of 32."""
    tensors, generator = tensors_of(source), torch.Generator().manual_seed(0)
    for name in linears_of(tensors):
        rows, columns = tensors.pop(f"{name}.weight").shape
        codes = torch.randint(16, (columns, rows), generator=generator)
        zeros = torch.randint(16, (columns // 32, rows), generator=generator)
        scales = (torch.rand(columns // 32, rows, generator=generator) + 0.5).half() / 64
        if method == "awq":
            parts = {"qweight": packed(codes, AWQ_ORDER), "qzeros": packed(zeros, AWQ_ORDER), "scales": scales}
        else:
            parts = {
                "qweight": packed(codes.T, PLAIN_ORDER).T,
                "qzeros": packed(torch.full_like(zeros, 7), PLAIN_ORDER),
                "scales": scales,
                "g_idx": torch.arange(columns, dtype=torch.int32) // 32,
            }
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    section: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": 32}
    section |= {"zero_point": True, "version": "gemm"} if method == "awq" else {"sym": True, "desc_act": False}
    return write_folder(target, tensors, read_config(source) | {"quantization_config": section})


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_words_are_clean_until_they_are_damaged(checkpoint, tmp_path, method):
    folder = words_folder(checkpoint("llama").folder, tmp_path / "folder", method)
    assert verify(folder).exit_code == 0
    q = "model.layers.0.self_attn.q_proj"
    change(folder, f"{q}.qzeros", lambda tensor: None)
    change(folder, f"{q}.scales", lambda tensor: tensor.float())
    change(folder, "model.layers.3.mlp.down_proj.scales", lambda tensor: tensor * float("nan"))
    change(folder, "model.layers.2.mlp.down_proj.qweight", lambda tensor: tensor.T)
    report = verify(folder)
    assert {finding.tensor for finding in report.findings} == {
        f"{q}.qzeros",
        f"{q}.scales",
        "model.layers.3.mlp.down_proj.scales",
        "model.layers.2.mlp.down_proj.qweight",
    }
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(group_size=64))
    assert sum("scales" in finding.tensor for finding in verify(folder).findings) == 28


def test_groups_that_are_not_there_are_named(checkpoint, tmp_path):
    folder = words_folder(checkpoint("llama").folder, tmp_path / "folder", "gptq")
    change(folder, "model.layers.0.mlp.up_proj.g_idx", lambda tensor: tensor + 1)
    (finding,) = verify(folder).findings
    assert finding.tensor == "model.layers.0.mlp.up_proj.g_idx"
    assert finding.problem == "has groups 1 to 2, and there are 2"


class Nibbles(Exporter):
    """Reads AWQ's layout, by a loop of its own."""

    name: ClassVar[str] = "save_autoawq"
    folder: ClassVar[str] = "autoawq_quant_model"

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        def columns(words: Tensor) -> Tensor:
            found = torch.zeros(words.shape[0], words.shape[1] * 8, dtype=torch.int8)
            for nibble, column in enumerate(AWQ_ORDER):
                found[:, column::8] = ((words >> (4 * nibble)) & 15).to(torch.int8) - 8
            return found.T.contiguous()

        assert self.spec is not None
        zero = columns(tensors["linear.qzeros"])
        weight = QWeight(columns(tensors["linear.qweight"]), tensors["linear.scales"].T.contiguous(), zero, self.spec)
        return UnitRecord(quantized={"linear": weight})


def test_values_of_a_format_are_read_by_its_exporter(checkpoint, tmp_path, monkeypatch):
    source = checkpoint("llama").folder
    folder = words_folder(source, tmp_path / "folder", "awq")
    stored, twin = tensors_of(folder), tensors_of(source)
    for name in linears_of(twin):
        scales = stored[f"{name}.scales"].float()
        dense = torch.zeros(twin[f"{name}.weight"].T.shape)
        for nibble, column in enumerate(AWQ_ORDER):
            zero = (stored[f"{name}.qzeros"] >> (4 * nibble)) & 15
            code = (stored[f"{name}.qweight"] >> (4 * nibble)) & 15
            part = (code - zero.repeat_interleave(32, 0)) * scales[:, column::8].repeat_interleave(32, 0)
            dense[:, column::8] = part
        twin[f"{name}.weight"] = dense.T.half().contiguous()
    fake = write_folder(tmp_path / "twin", twin, read_config(source))
    monkeypatch.setattr(llmc.verify.words, "EXPORTERS", ())
    report = verify(folder, fake)
    assert report.notes == ["not compared, nothing here reads them: model.layers.0.mlp.down_proj and 27 more"]
    monkeypatch.setattr(llmc.verify.words, "EXPORTERS", (Nibbles,))
    report = verify(folder, fake)
    assert (report.exit_code, report.notes) == (0, [])
    assert "against MODEL: 28 of 28 weights equal bit for bit" in report.checked
    change(folder, "model.layers.2.mlp.down_proj.qweight", lambda tensor: tensor ^ 1)
    assert [one.tensor for one in verify(folder, fake).findings] == ["model.layers.2.mlp.down_proj"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "quantization_config.bits is 5"),
        ({"quant_method": "awq", "bits": 4}, "quantization_config.group_size is None"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version: gemv"),
        ({"quant_method": "bitsandbytes"}, "known are compressed-tensors, awq, gptq, fp8, modelopt"),
        ({"quant_method": "compressed-tensors", "config_groups": 3}, "doesn't understand quantization_config"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "marlin-24",
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
            },
            "format marlin-24 isn't known here",
        ),
    ],
)
def test_a_section_that_is_not_understood_cannot_be_judged(checkpoint, tmp_path, section, said):
    source = checkpoint("llama").folder
    config = read_config(source) | {"quantization_config": section}
    report = verify(write_folder(tmp_path / "folder", tensors_of(source), config))
    assert report.exit_code == 2
    assert said in report.unjudged


def test_fp8_in_blocks_is_multiplied_by_its_scales(checkpoint, tmp_path):
    source = checkpoint("llama").folder
    tensors, twin = tensors_of(source), tensors_of(source)
    for name in linears_of(tensors):
        weight = tensors[f"{name}.weight"].float()
        scale = torch.full((1, 1), float(weight.abs().max()) / 448)
        codes = (weight / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}
        twin[f"{name}.weight"] = codes.float() * scale
    section = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    folder = write_folder(tmp_path / "folder", tensors, read_config(source) | {"quantization_config": section})
    fake = write_folder(tmp_path / "twin", twin, read_config(source))
    report = verify(folder, fake)
    assert (report.exit_code, [str(one) for one in report.findings]) == (0, [])
    assert "against MODEL: 28 of 28 weights equal bit for bit" in report.checked
    change(folder, "model.layers.0.mlp.up_proj.weight_scale_inv", lambda tensor: tensor / 2)
    assert [one.tensor for one in verify(folder, fake).findings] == ["model.layers.0.mlp.up_proj"]


# --- models --------------------------------------------------------------------------------------------------------

EXPERTS = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS |= {"num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "expert"),
    [
        (MixtralConfig(**EXPERTS, intermediate_size=96, num_local_experts=2), "block_sparse_moe.experts.1.w3"),
        (
            Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=96, num_experts=2, num_experts_per_tok=1, head_dim=16),
            "mlp.experts.1.up_proj",
        ),
    ],
    ids=["mixtral", "qwen3-moe"],
)
def test_experts_go_by_the_names_of_the_checkpoint(tmp_path, config, expert):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    scheme = preset("W4A16")
    tensors = tensors_of(tmp_path / "source")
    linears = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and not name.startswith(("lm_head", "model.embed")) and not name.endswith("gate.weight")
    ]
    for name in linears:
        parts = compressed(tensors.pop(f"{name}.weight"), scheme)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    section = QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format, ignore=["lm_head"]
    ).model_dump(mode="json")
    content = read_config(tmp_path / "source") | {"quantization_config": section}
    folder = write_folder(tmp_path / "folder", tensors, content)
    assert [str(finding) for finding in verify(folder).findings] == []
    change(folder, f"model.layers.1.{expert}.weight_scale", lambda tensor: None)
    assert [one.tensor for one in verify(folder).findings] == [f"model.layers.1.{expert}.weight_scale"] * 2


@pytest.mark.parametrize("family", ["llama-tied", "mistral", "qwen2", "qwen3", "opt", "opt-post-norm"])
def test_every_family_is_clean_and_misses_nothing_unnoticed(checkpoint, tmp_path, family):
    source = checkpoint(family).folder
    assert verify(source).exit_code == 0
    tensors = tensors_of(source)
    for name in tensors:
        folder = tmp_path / name
        write_folder(folder, {key: value for key, value in tensors.items() if key != name}, read_config(source))
        assert [one.tensor for one in verify(folder).findings] == [name]
        if name.count(".layers.") and ".layers.0." not in name:
            break


def test_names_that_leave_out_the_prefix_are_known(checkpoint, tmp_path):
    tiny = checkpoint("opt")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors_of(tiny.folder).items()}
    assert verify(write_folder(tmp_path / "folder", tensors, read_config(tiny.folder))).exit_code == 0


def test_scales_of_a_static_cache_are_expected_where_the_config_speaks_of_them(exported, tmp_path):
    made = exported("w4")
    content, tensors = read_config(made.vllm), tensors_of(made.vllm)
    section = content["quantization_config"] | {
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    }
    scales = {f"model.layers.{i}.self_attn.{part}_scale": torch.tensor([0.1]) for i in range(4) for part in "kv"}
    quantized = content | {"quantization_config": section}
    assert verify(write_folder(tmp_path / "with", tensors | scales, quantized)).exit_code == 0
    without = verify(write_folder(tmp_path / "without", tensors, quantized)).findings
    assert {one.tensor for one in without} == scales.keys()
    unasked = verify(write_folder(tmp_path / "unasked", tensors | scales, content)).findings
    assert {one.tensor for one in unasked} == scales.keys()


# --- ModelOpt ------------------------------------------------------------------------------------------------------


def modelopt_parts(weight: Tensor, algorithm: str) -> tuple[dict[str, Tensor], Tensor]:
    """A weight in ModelOpt's layout, and what it then is, by the arithmetic of its own documentation."""
    rows, columns = weight.shape
    if algorithm == "NVFP4":
        codes = torch.randint(8, (rows, columns), generator=torch.Generator().manual_seed(0))
        values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[codes]
        scale, whole = torch.full((rows, columns // 16), 1.5).to(torch.float8_e4m3fn), torch.tensor(0.01)
        parts = {"weight": (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8), "weight_scale": scale}
        return {**parts, "weight_scale_2": whole, "input_scale": torch.tensor(0.02)}, values * 1.5 * 0.01
    if algorithm == "W4A16_AWQ":
        scale = weight.float().reshape(rows, -1, 32).abs().amax(2) / 7
        codes = (weight.float() / scale.repeat_interleave(32, 1)).round().int()
        packed = ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).to(torch.uint8)
        smooth = torch.full((columns,), 0.5, dtype=torch.bfloat16)
        parts = {"weight": packed, "weight_scale": scale, "pre_quant_scale": smooth}
        return parts, codes * scale.repeat_interleave(32, 1) * 0.5
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.02)}, codes.float() * scale


@pytest.mark.parametrize("algorithm", ["FP8", "W4A16_AWQ", "NVFP4"])
def test_modelopts_layout_is_clean_until_it_is_damaged(checkpoint, tmp_path, algorithm):
    source = checkpoint("llama").folder
    tensors, twin = tensors_of(source), tensors_of(source)
    for name in linears_of(twin):
        parts, dense = modelopt_parts(tensors.pop(f"{name}.weight"), algorithm)
        if algorithm == "FP8":  # one scale for what runs as one
            parts["weight_scale"], dense = torch.tensor(0.02), parts["weight"].float() * 0.02
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        twin[f"{name}.weight"] = dense.float()
    section = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head", "*embed_tokens"]}
    section |= {"group_size": 32} if algorithm == "W4A16_AWQ" else {}
    folder = write_folder(tmp_path / "folder", tensors, read_config(source) | {"quantization_config": section})
    fake = write_folder(tmp_path / "twin", twin, read_config(source))
    report = verify(folder, fake)
    assert [str(one) for one in report.findings] == []
    assert "against MODEL: 28 of 28 weights equal bit for bit" in report.checked
    linear = "model.layers.2.self_attn.k_proj"
    change(folder, f"{linear}.weight", lambda tensor: tensor.flip(0))
    assert [one.tensor for one in verify(folder, fake).findings] == [linear]
    shared = {"FP8": "input_scale", "NVFP4": "weight_scale_2"}
    if algorithm in shared:
        change(folder, f"{linear}.{shared[algorithm]}", lambda tensor: tensor * 2)
        assert f"{linear}.{shared[algorithm]}" in {one.tensor for one in verify(folder).findings}
    change(folder, f"{linear}.weight_scale", lambda tensor: None)
    assert f"{linear}.weight_scale" in {one.tensor for one in verify(folder).findings}


def test_modelopts_mixed_checkpoints_name_each_linear(checkpoint, tmp_path):
    source = checkpoint("llama").folder
    tensors = tensors_of(source)
    name = "model.layers.0.mlp.down_proj"
    parts, _ = modelopt_parts(tensors.pop(f"{name}.weight"), "FP8")
    tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    tensors |= {f"model.layers.{i}.self_attn.{p}_proj.{p}_scale": torch.tensor(0.1) for i in range(4) for p in "kv"}
    section: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    section |= {"quantized_layers": {name: {"quant_algo": "FP8"}}, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    content = read_config(source) | {"quantization_config": section}
    folder = write_folder(tmp_path / "folder", tensors, content)
    assert [str(one) for one in verify(folder).findings] == []
    change(folder, "model.layers.3.self_attn.v_proj.v_scale", lambda tensor: None)
    assert {one.tensor for one in verify(folder).findings} == {"model.layers.3.self_attn.v_proj.v_scale"}
    section["quantized_layers"] = {name: {"quant_algo": "FP9"}}
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=section))
    assert "quant_algo FP9 isn't known here" in verify(folder).unjudged
