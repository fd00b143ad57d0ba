"""Decoders against independent readers: loops in float64, and Transformers' and compressed-tensors' own loading."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmc.errors import CheckpointError
from llmc.stream.decoders import open_checkpoint
from llmc.stream.decoding import Checkpoint
from llmc.stream.empty import load_config
from llmc.stream.source import BlockSource, check_finite

GENERATOR = torch.Generator().manual_seed(0)


def write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict | None = None, **config) -> Path:
    """A checkpoint of these tensors."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    content = {"model_type": "llama", "dtype": "bfloat16", **config}
    if quantization is not None:
        content["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as they are stored."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def decode(folder: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint's tensors, as a run gets them."""
    checkpoint = open_checkpoint(folder)
    source = BlockSource(checkpoint.units({"all": list(checkpoint.entries)}), checkpoint.decode)
    found = source.take("all")
    source.close()
    assert source.bytes_read == sum(entry.nbytes for entry in checkpoint.stored.values())
    assert source.reads == dict.fromkeys(checkpoint.stored, 1)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in checkpoint.entries.items()
    }
    return found


# --- FP8 -----------------------------------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def fp8(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=GENERATOR) * 40).to(torch.float8_e4m3fn)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=GENERATOR) * 1e-3 + 1e-4


@pytest.mark.parametrize(("shape", "block"), [((256, 384), [128, 128]), ((130, 70), [128, 64]), ((5, 9), [2, 4])])
def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path, shape, block):
    codes = fp8(*shape)
    factors = scales(math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    plain = torch.randn(3, dtype=torch.bfloat16)
    folder = write(
        tmp_path / "m",
        {"a.weight": codes, "a.weight_scale_inv": factors, "norm.weight": plain},
        {**FP8, "weight_block_size": block},
    )
    found = decode(folder)
    assert found.keys() == {"a.weight", "norm.weight"}
    expected = torch.empty(shape, dtype=torch.float64)
    for row in range(shape[0]):
        for column in range(shape[1]):
            expected[row, column] = float(codes[row, column]) * float(factors[row // block[0], column // block[1]])
    assert torch.equal(found["a.weight"], expected.float().to(torch.bfloat16))
    assert torch.equal(found["norm.weight"], plain)
    assert open_checkpoint(folder).says == f"FP8 in {block[0]}x{block[1]} blocks, decoded to bfloat16"


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_fp8_scale_a_tensor(tmp_path, shape):
    codes, factor = fp8(6, 4), scales(1).reshape(shape)
    folder = write(tmp_path / "m", {"a.weight": codes, "a.weight_scale_inv": factor}, {"quant_method": "fp8"})
    assert torch.equal(decode(folder)["a.weight"], (codes.float() * factor.float()).to(torch.bfloat16))
    assert "one scale a tensor" in open_checkpoint(folder).says


def test_fp8_experts_in_one_tensor_are_decoded_and_split(tmp_path):
    codes, factors = fp8(2, 8, 12), scales(2, 2, 3)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    folder = write(
        tmp_path / "m",
        {name: codes, f"{name}_scale_inv": factors},
        {**FP8, "weight_block_size": [4, 4]},
        model_type="qwen3_vl_moe",
    )
    found = decode(folder)
    dense = codes.float() * factors.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for expert in range(2):
        for of, part in (("gate", dense[expert, :, :6]), ("up", dense[expert, :, 6:])):
            weight = found[f"model.layers.0.mlp.experts.{expert}.{of}_proj.weight"]
            assert torch.equal(weight, part.T.to(torch.bfloat16))
            assert weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes


def test_an_fp8_model_is_what_transformers_loads(llama, tmp_path):
    """Blocks that divide every weight: its own dequantization knows no others."""
    tensors = {}
    for name, tensor in weights_of(llama.folder).items():
        if "_proj.weight" in name:
            tensors[name] = (tensor.float() * 50).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales(tensor.shape[0] // 32, tensor.shape[1] // 32)
        else:
            tensors[name] = tensor
    folder = Path(shutil.copytree(llama.folder, tmp_path / "m", ignore=shutil.ignore_patterns("*safetensors*")))
    config = json.loads((folder / "config.json").read_text())
    write(folder, tensors, {**FP8, "weight_block_size": [32, 32]}, **config)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True),
    )
    found = decode(folder)
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a.weight_scale_inv": None}, r"a\.weight is quantized, and its scales \(a\.weight_scale_inv\) are missing"),
        (
            {"a.weight_scale_inv": torch.ones(2, 3)},
            r"a\.weight \[130, 70\]: .* shape \[2, 3\], and \[2, 1\] \(blocks of",
        ),
        ({"a.weight_scale_inv": torch.ones(130, 1)}, r"\[2, 1\] \(blocks of 128x128\) is needed"),
    ],
)
def test_scales_that_do_not_fit_fp8_are_refused(tmp_path, change, says):
    tensors = {"a.weight": fp8(130, 70), "a.weight_scale_inv": scales(2, 1)} | change
    folder = write(tmp_path / "m", {name: t for name, t in tensors.items() if t is not None}, FP8)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder)


def test_a_code_that_is_no_number_is_found_in_the_decoded_weight(tmp_path):
    codes = fp8(4, 4).view(torch.uint8)
    codes[1, 2] = 0x7F
    tensors = {"a.weight": codes.view(torch.float8_e4m3fn), "a.weight_scale_inv": scales(1, 1)}
    with pytest.raises(CheckpointError, match=r"a\.weight: 1 of 16 values are NaN"):
        decode(write(tmp_path / "m", tensors, FP8))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_narrow_floats_are_checked_too(dtype):
    check_finite({"w": torch.ones(3).to(dtype)})
    with pytest.raises(CheckpointError, match="w: 1 of 3 values"):
        check_finite({"w": torch.tensor([1, torch.nan, 1]).to(dtype)})


# --- MXFP4 ---------------------------------------------------------------------------------------------------------

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
EXPERTS = "model.layers.0.mlp.experts"


def mxfp4(experts: int, rows: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.randint(256, (experts, rows, groups, 16), generator=GENERATOR, dtype=torch.uint8)
    return blocks, torch.randint(110, 135, (experts, rows, groups), generator=GENERATOR, dtype=torch.uint8)


def test_mxfp4_experts_are_what_transformers_converts(tmp_path):
    tensors, dense = {}, {}
    for of, rows, groups in (("gate_up_proj", 12, 2), ("down_proj", 64, 1)):
        blocks, exponents = mxfp4(3, rows, groups)
        tensors |= {f"{EXPERTS}.{of}_blocks": blocks, f"{EXPERTS}.{of}_scales": exponents}
        tensors[f"{EXPERTS}.{of}_bias"] = torch.randn(3, rows, generator=GENERATOR).to(torch.bfloat16)
        dense[of] = convert_moe_packed_tensors(blocks, exponents)  # [experts, in, out]
    found = decode(write(tmp_path / "m", tensors, MXFP4, model_type="gpt_oss"))
    assert len(found) == 3 * 3 * 2
    for expert in range(3):
        own = {of: found[f"{EXPERTS}.{expert}.{of}_proj.weight"] for of in ("gate", "up", "down")}
        assert torch.equal(own["gate"], dense["gate_up_proj"][expert, :, 0::2].T)
        assert torch.equal(own["up"], dense["gate_up_proj"][expert, :, 1::2].T)
        assert torch.equal(own["down"], dense["down_proj"][expert].T)
        bias = tensors[f"{EXPERTS}.gate_up_proj_bias"][expert]
        assert torch.equal(found[f"{EXPERTS}.{expert}.up_proj.bias"], bias[1::2])
    assert open_checkpoint(tmp_path / "m").says == "MXFP4, decoded to bfloat16"


def test_mxfp4_codes_are_those_of_the_format(tmp_path):
    """Every code in both halves of a byte, by the table of the specification."""
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    exponents = torch.arange(120, 136, dtype=torch.uint8).reshape(1, 1, 16)
    tensors = {"x.experts.down_proj_blocks": blocks, "x.experts.down_proj_scales": exponents}
    found = decode(write(tmp_path / "m", tensors, MXFP4, model_type="gpt_oss"))["x.experts.0.down_proj.weight"][0]
    for byte in range(256):
        factor = 2.0 ** (120 + byte // 16 - 127)
        assert float(found[2 * byte]) == table[byte & 15] * factor
        assert float(found[2 * byte + 1]) == table[byte >> 4] * factor


@pytest.mark.parametrize(
    ("scale", "says"), [(None, r"scales \(.*down_proj_scales\) are missing"), ((1, 4, 2), r"\[1, 4, 1\] is needed")]
)
def test_scales_that_do_not_fit_mxfp4_are_refused(tmp_path, scale, says):
    tensors = {f"{EXPERTS}.down_proj_blocks": mxfp4(1, 4, 1)[0]}
    if scale is not None:
        tensors[f"{EXPERTS}.down_proj_scales"] = torch.ones(scale, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(write(tmp_path / "m", tensors, MXFP4, model_type="gpt_oss"))


# --- compressed-tensors --------------------------------------------------------------------------------------------

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
DYNAMIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
SCHEMES = {
    "w4a16": ("pack-quantized", INT4, None),
    "w4a16-asymmetric": ("pack-quantized", {**INT4, "symmetric": False}, None),
    "w3a16-channel": ("pack-quantized", {**INT4, "num_bits": 3, "strategy": "channel", "group_size": None}, None),
    "w8a16": ("pack-quantized", {**INT4, "num_bits": 8}, None),
    "int8": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        {**DYNAMIC, "type": "int"},
    ),
    "fp8-channel": ("float-quantized", {**FLOAT8, "strategy": "channel"}, DYNAMIC),
    "fp8-tensor": ("float-quantized", {**FLOAT8, "strategy": "tensor"}, DYNAMIC),
    "fp8-block": (
        "float-quantized",
        {**FLOAT8, "strategy": "block", "block_structure": [32, 32]},
        {**DYNAMIC, "strategy": "group", "group_size": 32},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16},
        None,
    ),
    "mxfp8": ("mxfp8-quantized", {**FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}, None),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32},
        None,
    ),
}


def compressed_llama(llama, folder: Path, name: str, *, targets=("Linear",), ignore=("lm_head",), scale=torch.bfloat16):
    """The tiny Llama with every projection compressed by the library itself."""
    kind, weights, act = SCHEMES[name]
    scheme = QuantizationScheme(
        targets=list(targets),
        weights=QuantizationArgs(**weights),
        input_activations=None if act is None else QuantizationArgs(**act),
    )
    tensors = {}
    for key, tensor in weights_of(llama.folder).items():
        if not key.endswith("_proj.weight"):
            tensors[key] = tensor
            continue
        state = {"weight": tensor.float(), **qparams(tensor.float(), scheme.weights, scale)}
        module = key.removesuffix(".weight")
        packed = BaseCompressor.get_value_from_registry(kind).compress(state, scheme)
        tensors |= {f"{module}.{part}": t.contiguous() for part, t in packed.items()}
    shutil.copytree(llama.folder, folder, ignore=shutil.ignore_patterns("*safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    quantization = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme.model_dump(mode="json"), "format": kind}},
        "ignore": list(ignore),
    }
    return write(folder, tensors, quantization, **config)


def qparams(weight: torch.Tensor, args: QuantizationArgs, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Scales, of largest values; zero points of some other number, so that losing them shows."""
    rows, columns = weight.shape
    strategy = args.strategy
    group = args.group_size or columns
    top = {"int": 2 ** (args.num_bits - 1) - 1, "float": 448.0 if args.num_bits == 8 else 6.0}[str(args.type)]
    if strategy == "tensor":
        largest = weight.abs().amax().reshape(1)
    elif strategy == "block":
        largest = weight.abs().reshape(rows // 32, 32, columns // 32, 32).amax(dim=(1, 3))
    else:
        largest = weight.abs().reshape(rows, columns // group, group).amax(-1)
    if strategy == "tensor_group":
        whole = torch.tensor([448.0 * 6.0 / float(weight.abs().max())])
        return {"weight_scale": (largest / 6.0 * whole).to(torch.float8_e4m3fn).float(), "weight_global_scale": whole}
    scale = largest / top
    if args.type == "float" and args.group_size == 32:
        return {"weight_scale": torch.exp2(torch.ceil(torch.log2(scale)))}
    found = {"weight_scale": scale.to(scale_dtype)}
    if not args.symmetric:
        found["weight_zero_point"] = torch.randint(-4, 4, scale.shape, generator=GENERATOR, dtype=torch.int8)
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_a_compressed_model_is_what_transformers_loads(llama, tmp_path, name):
    folder = compressed_llama(llama, tmp_path / "m", name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    expected = model.state_dict()
    found = decode(folder)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key
    assert open_checkpoint(folder).says.startswith(f"compressed-tensors {SCHEMES[name][0]}")
    original = llama.model().state_dict()
    error = max(float((found[k].float() - original[k]).norm() / original[k].norm()) for k in found)
    assert 0 < error < (0.7 if "asymmetric" in name else 0.35)


@pytest.mark.parametrize("name", ["w4a16", "fp8-block"])
def test_a_sequence_of_scales_in_float32_is_multiplied_before_it_is_rounded(llama, tmp_path, name):
    folder = compressed_llama(llama, tmp_path / "m", name, scale=torch.float32)
    key = "model.layers.0.mlp.down_proj"
    stored = load_file(folder / "model.safetensors")
    found = decode(folder)[f"{key}.weight"]
    if name == "w4a16":
        words = stored[f"{key}.weight_packed"]
        codes = torch.stack([(words >> (4 * place)) & 15 for place in range(8)], dim=-1).flatten(1).double() - 8
        factors = stored[f"{key}.weight_scale"].double().repeat_interleave(32, 1)
    else:
        codes = stored[f"{key}.weight"].double()
        factors = stored[f"{key}.weight_scale"].double().repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(found, (codes * factors).float().to(torch.bfloat16))


def test_a_module_takes_the_group_that_names_it_most_exactly(llama, tmp_path):
    folder = compressed_llama(llama, tmp_path / "m", "w4a16")
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    coarse = {**groups["group_0"], "weights": {**groups["group_0"]["weights"], "group_size": 64}}
    exact = {**groups["group_0"], "targets": ["re:.*_proj$"]}
    config["quantization_config"]["config_groups"] = {"group_0": coarse, "group_1": exact}
    expected = decode(folder)
    (folder / "config.json").write_text(json.dumps(config))
    found = decode(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    config["quantization_config"]["config_groups"] = {"group_0": coarse}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight_scale has the shape .* \(group\) is needed"):
        open_checkpoint(folder)


def edited(folder: Path, remove: str = "", add: dict | None = None, **quantization) -> Path:
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if name != remove}
    save_file(tensors | (add or {}), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


K = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"remove": f"{K}.weight_scale"}, rf"{K}\.weight is quantized, .* \({K}\.weight_scale\) are missing"),
        ({"remove": f"{K}.weight_packed", "add": {f"{K}.weight": torch.ones(32, 64)}}, "isn't compressed with"),
        ({"remove": f"{K}.weight_shape"}, r"weight_shape\) are missing"),
        ({"remove": f"{K}.weight_zero_point"}, r"weight_zero_point\) are missing"),
        ({"add": {f"{K}.weight_scale": torch.ones(32, 3)}}, r"\[32, 64\]: .*shape \[32, 3\], and \[32, 2\]"),
        ({"add": {f"{K}.weight_g_idx": torch.ones(64, dtype=torch.int32)}}, "weight_g_idx"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsely"),
        ({"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}}, "rotates activations"),
        ({"config_groups": {}}, "no group of quantization_config"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": "x"}}}}, "num_bits"),
    ],
)  # fmt: skip
def test_damaged_or_unknown_compressed_tensors_are_refused(llama, tmp_path, changes, says):
    folder = compressed_llama(llama, tmp_path / "m", "w4a16-asymmetric")
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(edited(folder, **changes))
    assert caught.value.remedy


def test_an_unknown_format_of_compressed_tensors_is_refused(llama, tmp_path):
    folder = compressed_llama(llama, tmp_path / "m", "w4a16")
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    with pytest.raises(CheckpointError, match="stored as marlin-24"):
        open_checkpoint(edited(folder, config_groups={"group_0": {**group, "format": "marlin-24"}}))


# --- any -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_that_nothing_explains_are_refused(tmp_path, dtype):
    folder = write(tmp_path / "m", {"a.weight": torch.ones(4, 4).to(dtype)})
    with pytest.raises(CheckpointError, match=r"a\.weight is stored in \w+, and config\.json doesn't say how"):
        open_checkpoint(folder)


def test_sources_are_let_go_as_they_are_decoded(tmp_path):
    tensors = {}
    for index in range(3):
        tensors |= {f"{index}.weight": fp8(4, 4), f"{index}.weight_scale_inv": scales(1, 1)}
    checkpoint = open_checkpoint(write(tmp_path / "m", tensors, FP8))
    left: list[int] = []
    raw = dict(tensors)
    stage = checkpoint.stages[0]
    for one in stage.decoded:
        object.__setattr__(one, "decode", lambda own, run=one.decode: left.append(len(raw)) or run(own))
    checkpoint.decode(raw)
    assert left == [6, 4, 2]
    assert raw == {}


def test_a_tensor_that_units_share_is_refused(tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    folder = write(tmp_path / "m", {name: torch.ones(2, 3, 4)}, model_type="llama4_text")
    checkpoint = open_checkpoint(folder)
    first, second = checkpoint.entries
    with pytest.raises(CheckpointError, match="weights of several blocks"):
        checkpoint.units({"a": [first], "b": [second]})


def test_a_plain_checkpoint_passes_untouched(llama):
    checkpoint = llama.checkpoint
    assert checkpoint.says == "" and not checkpoint.stages
    assert checkpoint.entries.keys() == checkpoint.stored.keys()
    tensors = {"a": torch.ones(2)}
    assert Checkpoint(checkpoint.stored).decode(tensors)["a"] is tensors["a"]


def test_the_model_forgets_that_it_was_quantized(llama, tmp_path):
    folder = compressed_llama(llama, tmp_path / "m", "w4a16")
    assert "quantization_config" not in load_config(folder, trust_remote_code=False).to_dict()
