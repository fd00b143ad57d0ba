"""Whole runs over mixtures: every method, what is written, and what Transformers makes of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import WINDOW, WINDOWS, Case, files_of, make_case, reload, write_pieces
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from families import CONFIGS
from gguf import GGUFReader
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CompressedTensorsConfig

import llmc
from llmc.cli import main
from llmc.errors import LlmcError, ModelError
from llmc.verify import verify

VLLM, FAKE = "vllm_quant_model", "fake_quant_model"
INT8, FP8 = {"bit": 8, "symmetric": True}, {"bit": "e4m3", "symmetric": True}
W8, STATIC = {**INT8, "granularity": "per_channel"}, {"granularity": "per_tensor", "static": True}
W4 = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 32}

RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "RTN": ("RTN", {"quant": {"weight": W4}}),
    "GPTQ": ("GPTQ", {}),
    "AWQ": ("Awq", {"quant": {"weight": W4}}),
    "SmoothQuant": ("SmoothQuant", {"quant": {"weight": W8, "act": {**INT8, "granularity": "per_token"}}}),
    "QuaRot": (["Quarot", "GPTQ"], {"quant": {"weight": W4, "special": {"Quarot": {"online_rotate": False}}}}),
    "Wanda": ("RTN", {"quant": {"weight": W4}, "sparse": {"method": "Wanda", "weight": {"sparsity": 0.5}}}),
    "SparseGPT": ("GPTQ", {"sparse": {"method": "SparseGPT", "weight": {"sparsity": 0.5}}}),
    "OmniQuant": ("OmniQuant", {"quant": {"weight": W4, "special": {"epochs": 1, "let": True, "lwc": True}}}),
    "static FP8": (
        "RTN",
        {"quant": {"weight": {**FP8, "granularity": "per_tensor"}, "act": {**FP8, **STATIC}}},
    ),
    "static int8": ("GPTQ", {"quant": {"weight": W8, "act": {"bit": 8, "symmetric": False, **STATIC}}}),
    "NVFP4": ("RTN", {"quant": {"weight": {"bit": "nvfp4"}}}),
}
ROTATABLE = [name for name in CONFIGS if name != "qwen3-next"]
BY_TRANSFORMERS = {"RTN", "AWQ", "QuaRot", "Wanda", "OmniQuant", "static FP8"}
"""What Transformers 5.23 loads: of experts it knows neither zero points nor plain int8 nor NVFP4's global scales."""

LINEARS = {
    "mixtral": 2 * (4 + 12),
    "qwen2-moe": 4 + 3 + 4 + 12 + 3,
    "qwen3-moe": 2 * (4 + 12),
    "qwen3-next": 3 + 4 + 2 * (12 + 3),
    "deepseek-v2": 4 + 3 + 4 + 12 + 3,
    "deepseek-v3": 5 + 3 + 5 + 12 + 3,
}
"""That are quantized: attention, and feed-forward parts of each block."""

CASES = [(family, recipe) for family in CONFIGS for recipe in RECIPES if recipe != "QuaRot" or family in ROTATABLE]


@pytest.fixture(scope="module")
def done(
    source_of: Callable[[str], Path], texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Case, llmc.Result]]:
    """The run of a recipe over a family, made once."""
    made: dict[tuple[str, str], tuple[Case, llmc.Result]] = {}

    def get(family: str, recipe: str) -> tuple[Case, llmc.Result]:
        key = family, recipe
        if key not in made:
            method, changes = RECIPES[recipe]
            case = make_case(source_of(family), texts, tmp_path_factory.mktemp("run") / "out", method, **changes)
            made[key] = case, case.compress()
        return made[key]

    return get


def windows_of(case: Case) -> Tensor:
    text = Path(case.content["eval"]["path"]).read_text()
    ids = AutoTokenizer.from_pretrained(case.source)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)


@torch.no_grad()
def logits(folder: Path, windows: Tensor, **options: Any) -> list[Tensor]:
    # Transformers leaves decompressed experts in the dtype of their scales.
    model = reload(folder, experts_implementation="eager", **options).float()
    return [model(input_ids=window[None], use_cache=False).logits[0] for window in windows]


def perplexity(found: list[Tensor], windows: Tensor) -> float:
    losses = [nn.functional.cross_entropy(y[:-1], ids[1:]) for y, ids in zip(found, windows, strict=True)]
    return exp(float(torch.stack(losses).double().mean()))


def measured(result: llmc.Result) -> dict[str, float]:
    return {one.position: one.value for one in result.perplexities}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def decompressed(folder: Path) -> dict[str, Tensor]:
    """The quantized weights as compressed-tensors sees each Linear of the folder."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(folder).items():
        linear, _, part = name.rpartition(".")
        parts.setdefault(linear, {})[part] = tensor.float() if part == "weight_scale" else tensor
    quantized = {name: own for name, own in parts.items() if "weight_scale" in own}
    return {f"{name}.weight": compressor.decompress(own, scheme)["weight"] for name, own in quantized.items()}


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_what_is_written_is_what_was_evaluated(done, family, recipe):
    case, result = done(family, recipe)
    windows, found = windows_of(case), measured(result)
    fake = logits(case.save_path / FAKE, windows)
    if recipe in BY_TRANSFORMERS:
        dense = logits(case.save_path / VLLM, windows, quantization_config=CompressedTensorsConfig(dequantize=True))
        assert all(torch.equal(a, b) for a, b in zip(fake, dense, strict=True))
    expected = tensors_of(case.save_path / FAKE)
    found_weights = decompressed(case.save_path / VLLM)
    for name, tensor in found_weights.items():
        narrow = torch.bfloat16 if recipe == "NVFP4" else expected[name].dtype  # which it's returned in
        assert torch.equal(tensor.to(narrow), expected[name].to(narrow)), name
    linears = [name for block in result.metrics["blocks"] for name in block["layers"]]
    assert len(found_weights) == len(linears) == LINEARS[family]
    assert found["fake_quant"] != pytest.approx(found["pretrain"], rel=1e-4)
    assert 0.4 < found["fake_quant"] / found["pretrain"] < 2
    if case.content["quant"].get("act") is None:
        assert found["fake_quant"] == pytest.approx(perplexity(fake, windows), rel=1e-6)
    assert verify(case.save_path / VLLM, case.save_path / FAKE).findings == []


def test_the_streamed_original_is_transformers_own(done, family):
    case, result = done(family, "RTN")
    windows = windows_of(case)
    whole = logits(case.source, windows)
    assert measured(result)["pretrain"] == pytest.approx(perplexity(whole, windows), rel=1e-6)
    assert result.metrics["bytes_read"] == result.metrics["model"]["bytes"]


@pytest.mark.parametrize("recipe", ["GPTQ", "static FP8"])
def test_experts_have_the_checkpoints_own_names_and_routers_stay(done, family, recipe):
    case, _ = done(family, recipe)
    original, fake, stored = (tensors_of(path) for path in (case.source, case.save_path / FAKE, case.save_path / VLLM))
    assert fake.keys() == original.keys()
    config = json.loads((case.save_path / VLLM / "config.json").read_text())["quantization_config"]
    ignored = set(config["ignore"])
    # What isn't a Linear of the blocks: routers, the gates of shared experts, what corrects a router, the head.
    kept = [
        name
        for name in original
        if name.endswith((".gate.weight", "shared_expert_gate.weight", "e_score_correction_bias", "lm_head.weight"))
    ]
    assert any(name.endswith(".gate.weight") for name in kept)
    for name in kept:
        assert torch.equal(stored[name], original[name]) and torch.equal(fake[name], original[name])
        linear = name.removesuffix(".weight")
        assert name.endswith("_bias") or is_ignored(linear, ignored), name
    assert any(name.endswith("e_score_correction_bias") for name in kept) == (family == "deepseek-v3")
    experts = [name.removesuffix(".weight") for name in original if re.search(r"\.experts\.\d+\.", name)]
    place = r"model\.layers\.\d\." + (
        r"block_sparse_moe\.experts\.\d\.w[123]" if family == "mixtral" else r"mlp\.experts\.\d\.(gate|up|down)_proj"
    )
    assert len(experts) == 4 * 3 * (2 if family in ("mixtral", "qwen3-moe", "qwen3-next") else 1)
    for name in experts:
        assert re.fullmatch(place, name) and not is_ignored(name, ignored)
        assert any(f"{name}.weight{suffix}" in stored for suffix in ("_packed", "_scale"))
        assert not torch.equal(fake[f"{name}.weight"], original[f"{name}.weight"])


def is_ignored(linear: str, ignored: set[str]) -> bool:
    """By its name, or by an expression behind ``re:``."""
    return any(re.match(one[3:], linear) if one.startswith("re:") else one == linear for one in ignored)


def test_experts_share_the_range_of_their_inputs(done, family):
    """A backend rounds the experts' common input once: one scale for the first Linears of all, one for the last ones of
    all."""
    case, result = done(family, "static FP8")
    stored = tensors_of(case.save_path / VLLM)
    inputs = {name: tensor for name, tensor in stored.items() if name.endswith(".input_scale") and ".experts." in name}
    layer = next(name.partition(".experts.")[0] for name in reversed(inputs))
    own = {name: float(tensor) for name, tensor in inputs.items() if name.startswith(f"{layer}.experts.")}
    down = {scale for name, scale in own.items() if re.search(r"\.(down_proj|w2)\.", name)}
    first = {scale for name, scale in own.items() if not re.search(r"\.(down_proj|w2)\.", name)}
    assert len(own) == 12 and len(down) == len(first) == 1 and down != first
    keys = [key for key in result.metrics["blocks"][1]["inputs"] if ".experts." in key]
    assert keys == ["mlp.experts.*.gate_proj+mlp.experts.*.up_proj", "mlp.experts.*.down_proj"]


def test_a_family_that_can_not_be_rotated_says_why(case):
    with pytest.raises(ModelError, match="Qwen3-Next can't be rotated"):
        case("qwen3-next", ["Quarot", "GPTQ"]).compress()


@pytest.mark.parametrize("recipe", ["GPTQ", "AWQ", "static int8"])
def test_another_format_of_a_finished_run_has_the_bytes_of_the_run(done, case, family, recipe):
    both, _ = done(family, recipe)
    method, changes = RECIPES[recipe]
    one = case(family, method, save={"save_fake": False}, **{**changes, "eval": {"eval_pos": []}})
    one.compress()
    assert main(["export", "--from", str(one.save_path), "--to", "fake"]) == 0
    for folder in (VLLM, FAKE):
        assert files_of(one.save_path / folder) == files_of(both.save_path / folder)


GROUPS = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 32}
FORMATS: dict[str, dict[str, Any]] = {
    "save_sgl": {"weight": GROUPS},
    "save_trtllm": {"weight": {**FP8, "granularity": "per_tensor"}, "act": {**FP8, **STATIC}},
    "save_autoawq": {"weight": {**GROUPS, "symmetric": False}},
    "save_autogptq": {"weight": GROUPS},
    "save_lightllm": {"weight": GROUPS},
    "save_llamacpp": {"weight": {**GROUPS, "bit": 8}},
    "save_mlcllm": {"weight": {**GROUPS, "symmetric": False}},
}
REFUSED = {
    "save_mlcllm": dict.fromkeys(CONFIGS, "its backend takes llama"),
    "save_llamacpp": {
        "qwen2-moe": r"mlp_only_layers \[0\]",
        "qwen3-moe": "norm_topk_prob False",
        **dict.fromkeys(["qwen3-next", "deepseek-v2", "deepseek-v3"], "can't be written for llama.cpp"),
    },
}


@pytest.mark.parametrize("save", FORMATS)
def test_every_format_holds_the_evaluated_model_or_says_why_not(case, source_of, tmp_path, family, save):
    source = shutil.copytree(source_of(family), tmp_path / "pieced")
    write_pieces(source)
    saved = {"save_vllm": False, save: True}
    run = case(source, "RTN", quant=FORMATS[save], save=saved, eval={"eval_pos": []})
    reason = REFUSED.get(save, {}).get(family)
    if reason is not None:
        with pytest.raises(LlmcError, match=reason):
            run.compress()
        return
    folder = Path(run.compress().outputs[save]["folder"])
    report = verify(folder, run.save_path / FAKE)
    assert report.findings == [] and not report.unjudged


def test_the_importance_matrix_has_a_row_for_each_expert(case, source_of, tmp_path):
    """The number of tokens that it saw, and the squares that it read of them: what all experts read is what their
    router read, twice."""
    source = shutil.copytree(source_of("mixtral"), tmp_path / "pieced")
    write_pieces(source)
    run = case(source, "RTN", save={"save_vllm": False, "save_fake": False, "save_imatrix": True, "save_trans": True})
    run.compress()
    reader = GGUFReader(run.save_path / "imatrix" / "imatrix.gguf")
    found = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    for block in range(2):
        for linear, width in (("gate", 64), ("up", 64), ("down", 96)):
            name = f"blk.{block}.ffn_{linear}_exps.weight"
            assert found[f"{name}.in_sum2"].shape == (4, width) and found[f"{name}.counts"].shape == (4, 1)
            assert found[f"{name}.counts"].sum() == 2 * 64 and found[f"{name}.counts"].unique().numel() > 1
            assert (found[f"{name}.in_sum2"] > 0).all()
        both = [found[f"blk.{block}.ffn_{linear}_exps.weight.in_sum2"] for linear in ("gate", "up")]
        assert torch.equal(*both)


def test_the_plan_names_experts_together(case, capsys):
    run = case("qwen2-moe", "RTN")
    assert main([*run.arguments, "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line[0] for line in lines if line and line[0].startswith("model.layers.1.mlp.")]
    path = "model.layers.1.mlp"
    assert rows == [
        *(f"{path}.experts.0-3.{name}" for name in ("gate_proj", "up_proj")),
        *(f"{path}.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        f"{path}.experts.0-3.down_proj",
    ]
    assert not run.save_path.exists()


def test_experts_with_a_scheme_of_their_own_have_a_row_of_their_own(case, capsys):
    down = {"layer_name": ["mlp.experts.2.down_proj"], "do_quant": False}
    save = {"save_vllm": False, "save_fake": True}  # vLLM has one scheme for all experts of a layer
    run = case("qwen3-moe", "RTN", quant={"mix_bits": {"one": down}}, save=save)
    assert main([*run.arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.mlp.experts.0-1,3.down_proj" in out and "model.layers.0.mlp.experts.2.down_proj" in out
    assert main([*run.arguments, "--dry-run", "--set", "quant.mix_bits.one.layer_name=[no_such]"]) == 2
    assert "mlp.experts.0-3.down_proj" in capsys.readouterr().err
