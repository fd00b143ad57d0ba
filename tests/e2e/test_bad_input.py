"""Bad input ends with code 2 and one message that says what, where and what to do; nothing is written or read."""

from __future__ import annotations

import subprocess
import sys

import pytest
from refusals import contains
from safetensors.torch import load_file

from llmc.cli import main

# --- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("quant.wieght.bit=4", ["quant.wieght", "did you mean 'weight'"]),
        ("quant.method=GTPQ", ["quant.method", "'GTPQ'", "did you mean 'GPTQ'"]),
        ("quant.method=TesseraQ", ["quant.method", "'TesseraQ' isn't available", "GPTQ"]),
        ("quant.weight.symmetric=4", ["quant.weight.symmetric", "4"]),
        ("quant.weight.bit=17", ["quant.weight.bit", "17 is not in 2..16"]),
        ("quant.weight.group_size=0", ["quant.weight.group_size", "above 0"]),
        ("calib.n_samples=-1", ["calib.n_samples", "-1"]),
        ("quant.method=[RTN, GPTQ]", ["quant.method", "RTN and GPTQ", "['RTN']"]),
        ("quant.method=[GPTQ, Awq]", ["quant.method", "GPTQ must come last", "['Awq', 'GPTQ']"]),
        (
            "quant.act={bit: 8, symmetric: true, granularity: per_head, head_num: 2}",
            ["quant.act.granularity: per_head"],
        ),
        ("quant.act={bit: e4m7, symmetric: true, granularity: per_token}", ["quant.act.bit: e4m7", "not available"]),
        ("quant.act={bit: e4m3, symmetric: false, granularity: per_token}", ["quant.act.symmetric", "no zero point"]),
        ("quant.act={bit: nvfp4, group_size: 32}", ["quant.act.group_size", "nvfp4 has groups of 16"]),
        ("quant.act={bit: 8, symmetric: true, granularity: per_token, static: true}", ["quant.act.gran", "per_tensor"]),
        ("quant.weight={bit: e2m1, symmetric: true, granularity: per_block}", ["quant.weight.block_size", "missing"]),
        ("save.trtllm_cfg={tp_size: 2, pp_size: 1}", ["save.trtllm_cfg", "trtllm-serve --tp_size"]),
        ("save.save_trtllm=true", ["TensorRT-LLM has no method for W4 g32 asym", "save_trtllm", "group_size: 128"]),
        ("quant.act={bit: 8, symmetric: true, granularity: per_token}", ["W4 g32 asym, A8 token sym", "symmetric"]),
        ("save.save_mlcllm=true", ["save_mlcllm", "each group of 128", "group_size: 128"]),
        ("save.save_autogptq=true", ["save_autogptq", "refuse zero points", "save_autoawq"]),
        ("base.device=cuda:99", ["base.device", "cuda:99", "cpu"]),
        ("ignored_layers={layer_names: [w_proj]}", ["ignored_layers", "matches no layer", "--dry-run"]),
        ("model.type=Opt", ["model.type", "'Opt'", "'llama'", "'Llama'"]),
        ("model.type=Lama", ["model.type", "Lama", "did you mean 'Llama'"]),
        ("save.save_path=null", ["save.save_path", "missing"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_configuration(case, refused, override, said):
    contains(refused(case(), override), *said)


def test_float16_is_too_narrow_to_learn_in(case, refused):
    contains(refused(case(method="OmniQuant"), "model.torch_dtype=torch.float16"), "model.torch_dtype", "bfloat16")


def test_learned_ranges_are_for_those_who_learn(case, refused):
    contains(refused(case(method="Awq"), "quant.weight.calib_algo=learnable"), "quant.weight.calib_algo: learnable")


@pytest.mark.parametrize("method", ["GPTQ", "Awq", "OmniQuant"])
def test_calibration_text_is_missing_for_a_method_that_needs_it(case, refused, method):
    contains(refused(case(method=method), "calib=null"), "calib", method)


@pytest.mark.parametrize(
    "act", ["{bit: 8, symmetric: true, granularity: per_tensor, static: true}", "{bit: nvfp4}"], ids=["static", "nvfp4"]
)
def test_calibration_text_is_missing_for_ranges_of_activations(case, refused, act):
    contains(refused(case(save={"save_vllm": False}), "calib=null", f"quant.act={act}"), "quant.act (A", "calib")


@pytest.mark.parametrize("act", ["{bit: 8, symmetric: true, granularity: per_group, group_size: 48}"])
def test_groups_of_activations_that_divide_no_layer(case, refused, act):
    message = refused(case(save={"save_vllm": False}), f"quant.act={act}")
    contains(message, "quant.act.group_size: 48", "64 input channels of model.layers.0.self_attn.q_proj", "32, 64")
    contains(message, "per_token", "ignored_layers")


def test_a_group_size_that_divides_no_layer_names_the_layer_and_the_sizes_that_would(case, refused):
    message = refused(case(), "quant.weight.group_size=48")
    contains(message, "group_size: 48", "64 input channels of model.layers.0.self_attn.q_proj", "32, 64")


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("{bit: 4, symmetric: false, granularity: per_group, group_size: 16}", ["groups of 16", "32, 64, 128"]),
        ("{bit: 8, symmetric: false, granularity: per_channel}", ["8-bit weights with zero points", "symmetric: true"]),
        ("{bit: 4, symmetric: true, granularity: per_tensor}", ["one scale per tensor", "per_channel"]),
    ],
    ids=["group 16", "asymmetric 8 bits", "per tensor"],
)
def test_a_scheme_that_vllm_cannot_load(case, refused, weight, said):
    contains(refused(case(), f"quant.weight={weight}"), "vLLM", "save_vllm", "save_fake", "Transformers", *said)


INT8 = "{bit: 8, symmetric: true, granularity: per_channel}"
FP8 = "{bit: e4m3, symmetric: true, granularity: per_channel}"


@pytest.mark.parametrize(
    ("weight", "act", "said"),
    [
        ("{bit: 4, symmetric: true, granularity: per_channel}", "{bit: 4, symmetric: true, granularity: per_token}",
         ["W4 channel sym, A4 token sym", "bit: 8", "leave out quant.act"]),
        ("{bit: 6, symmetric: true, granularity: per_channel}", "{bit: 6, symmetric: true, granularity: per_token}",
         ["W6 channel sym, A6 token sym", "bit: 8"]),
        ("{bit: 8, symmetric: false, granularity: per_channel}", "{bit: 8, symmetric: true, granularity: per_token}",
         ["W8 channel asym", "symmetric weights"]),
        ("{bit: 8, symmetric: true, granularity: per_group, group_size: 32}",
         "{bit: 8, symmetric: true, granularity: per_token}", ["W8 g32 sym", "per_channel"]),
        (INT8, "{bit: 8, symmetric: true, granularity: per_tensor}", ["A8 tensor sym", "one scale per token"]),
        (INT8, "{bit: e4m3, symmetric: true, granularity: per_token}", ["A8 e4m3 token", "bit: e4m3"]),
        (FP8, "{bit: e5m2, symmetric: true, granularity: per_token}", ["A8 e5m2 token", "bit: e4m3"]),
        (FP8, "{bit: e4m3, symmetric: true, granularity: per_group, group_size: 32}", ["A8 e4m3 g32", "per token"]),
        ("{bit: mxfp8}", "null", ["W8 mxfp8", "act {bit: mxfp8}"]),
        ("{bit: nvfp4}", "{bit: mxfp4}", ["W4 nvfp4, A4 mxfp4", "act {bit: nvfp4}"]),
    ],
)  # fmt: skip
def test_activations_that_vllm_cannot_load(case, refused, weight, act, said):
    message = refused(case(), f"quant.weight={weight}", f"quant.act={act}")
    contains(message, "vLLM has no kernel", "save_vllm", "nearest", "save_fake", *said)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("{bit: 4, symmetric: true, granularity: per_channel, scale_dtype: float32}", ["16 bits", "scale_dtype"]),
        ("{bit: 8, symmetric: true, granularity: per_channel, scale_dtype: bfloat16}", ["float32", "scale_dtype"]),
    ],
    ids=["wide scales", "narrow scales"],
)
def test_scales_that_vllm_would_round_again(case, refused, weight, said):
    act = "{bit: 8, symmetric: true, granularity: per_token}"
    contains(refused(case(), f"quant.weight={weight}", f"quant.act={act}"), "vLLM", "save_vllm", *said)


def test_linears_that_vllm_fuses_must_be_ignored_together(case, refused):
    message = refused(case(), "ignored_layers={layer_names: [self_attn.q_proj]}")
    contains(message, "vLLM fuses", "q_proj", "k_proj", "ignored_layers")


# --- a process of its own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [(["quant.weight.bit=17"], "17 is not in 2..16"), (["quant.weight.group_size=48"], "doesn't divide")],
)
def test_the_exit_code_of_the_process(case, overrides, said):
    run = case()
    command = [sys.executable, "-m", "llmc", *run.arguments, "--set", *overrides]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    contains(ended.stderr, said)
    assert not run.save_path.exists()


def test_everything_that_a_finished_run_leaves_can_be_loaded(case):
    run = case(method="GPTQ")
    assert main(run.arguments) == 0
    files = {"metrics.json", "report.html", "surfaces.safetensors"}
    assert {path.name for path in run.save_path.iterdir()} == {*files, "vllm_quant_model", "fake_quant_model"}
    assert load_file(run.save_path / "surfaces.safetensors")
    for folder in ("vllm_quant_model", "fake_quant_model"):
        assert all(load_file(file) for file in (run.save_path / folder).glob("*.safetensors"))
