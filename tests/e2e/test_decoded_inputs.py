"""Runs whose input isn't a plain checkpoint: decoded while it's read, it gives the bytes that dense weights give."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import WINDOW, Case, reload, write_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llmc.algorithms import options_types
from llmc.cli import main
from llmc.config import load_config
from llmc.export import without_quantization
from llmc.models import BlockSelection
from llmc.outputs import stored_config, stored_source
from llmc.prepare import prepare
from llmc.stream.headers import read_headers

W4 = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 32}
FP8 = {
    "weight": {"bit": "e4m3", "symmetric": True, "granularity": "per_channel"},
    "act": {"bit": "e4m3", "symmetric": True, "granularity": "per_token"},
}
FAKE, VLLM, TRANS = "fake_quant_model", "vllm_quant_model", "transformed_model"
QUIET = {"eval_pos": []}


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(params=["w4a16", "fp8"])
def exported(request, case) -> Path:
    """What save_vllm wrote: an input that must be decoded."""
    quant = {"weight": W4} if request.param == "w4a16" else FP8
    run = case(quant=quant, eval=QUIET, save={"save_fake": False})
    run.compress()
    return run.save_path / VLLM


def dequantized(folder: Path, target: Path) -> Path:
    """The same by Transformers."""
    dense = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=dense)
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    assert not hasattr(plain.config, "quantization_config")
    plain.save_pretrained(target)
    write_tokenizer(target)
    return target


def test_a_compressed_input_gives_the_bytes_that_its_dequantized_one_gives(case, exported, tmp_path):
    dense = dequantized(exported, tmp_path / "dense")
    quant = {"weight": {**W4, "symmetric": False, "group_size": 64}}
    runs = [case(checkpoint, quant=quant) for checkpoint in (exported, dense)]
    results = [run.compress() for run in runs]
    for name in (FAKE, VLLM):
        written = shards(runs[0].save_path / name)
        assert written and written == shards(runs[1].save_path / name)
    assert [p.value for p in results[0].perplexities] == [p.value for p in results[1].perplexities]
    assert results[0].metrics["bytes_read"] == sum(entry.nbytes for entry in read_headers(exported).values())
    assert results[0].metrics["model"]["input"].startswith("compressed-tensors")
    assert results[1].metrics["model"]["input"] is None
    config = json.loads((runs[0].save_path / FAKE / "config.json").read_text())
    assert "quantization_config" not in config
    assert torch.equal(logits(runs[0].save_path / FAKE), logits(runs[1].save_path / FAKE))


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.arange(WINDOW)[None] % 190
    return reload(folder)(tokens).logits


def test_the_plan_and_the_summary_say_what_the_input_was(case, exported, capsys):
    run = case(exported, quant={"weight": W4}, eval=QUIET)
    assert main([*run.arguments, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "input" in plan and "decoded to bfloat16" in plan
    assert main(run.arguments) == 0
    assert "decoded to bfloat16" in capsys.readouterr().out


def test_formats_get_a_configuration_that_does_not_speak_of_the_inputs_codes(case, exported):
    config = json.loads((exported / "config.json").read_text())
    inner = {"quantization_config": config["quantization_config"], "vocab_size": 208}
    prepared = prepare(load_config(case(exported).content, (), options_types()))
    selection = BlockSelection(4, prepared.adapter.blocks)
    assert "quantization_config" in config
    assert "quantization_config" not in stored_config(prepared, selection)
    assert "quantization_config" not in stored_source(prepared, selection).config
    assert without_quantization({"text_config": inner}) == {"text_config": {"vocab_size": 208}}


def test_a_killed_run_over_a_compressed_input_goes_on_to_the_same_bytes(case, exported):
    run, calm = (case(exported, "GPTQ", base={"checkpoint_every": 1}) for _ in range(2))
    calm.compress()
    kill_behind_block(run, 1)
    run.compress()
    assert run.written() == calm.written()


def kill_behind_block(run: Case, block: int) -> None:
    """Start a run in another process, which kills itself behind a block's journal row."""
    code = (
        "import os, signal, sys\n"
        "from llmc.cli import main\n"
        "from llmc.stream.journal import Journal\n"
        "append = Journal.append\n"
        "def last(self, row):\n"
        "    append(self, row)\n"
        f"    if row.get('unit') == 'block-{block}':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Journal.append = last\n"
        "main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, *run.arguments], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


# --- the original's own layout ---------------------------------------------------------------------------------------


@pytest.fixture
def gpt2(source_of) -> Path:
    return source_of("gpt2")


@pytest.mark.parametrize("method", ["RTN", ["Awq", "GPTQ"], ["Quarot", "RTN"]])
def test_a_gpt2_is_written_as_transformers_has_it(case, gpt2, method):
    """Transposed in the dense folders, ``[out, in]`` in vLLM's; what is evaluated is what is reloaded."""
    wide = {"bit": 8, "symmetric": True, "granularity": "per_channel"}
    run = case(gpt2, method, quant={"weight": wide}, save={"save_trans": True})
    result = run.compress()
    original, written = (
        {name: tuple(entry.shape) for name, entry in read_headers(folder).items()}
        for folder in (gpt2, run.save_path / FAKE)
    )
    head = {"lm_head.weight": (208, 64)} if "Quarot" in method else {}
    assert written == original | head
    packed = read_headers(run.save_path / VLLM)
    assert packed["transformer.h.0.mlp.c_fc.weight_scale"].shape[0] == 128
    values = {one.position: one.value for one in result.perplexities}
    for folder, position in ((FAKE, "fake_quant"), (gpt2, "pretrain")):
        assert perplexity(run, folder) == pytest.approx(values[position], rel=1e-5)
    assert (logits(run.save_path / TRANS) - logits(gpt2)).abs().max() < 0.2 * logits(gpt2).std()


def perplexity(run: Case, folder: Path | str) -> float:
    """The whole model on the run's evaluation text."""
    from transformers import AutoTokenizer

    model = reload(run.save_path / folder)
    text = Path(run.content["eval"]["path"]).read_text()
    ids = AutoTokenizer.from_pretrained(run.source)(text, return_tensors="pt").input_ids[0]
    losses = []
    for start in range(0, 3 * WINDOW, WINDOW):
        window = ids[start : start + WINDOW][None]
        scores = model(window).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(scores, window[0, 1:]))
    return float(torch.stack(losses).mean().exp())


def test_further_formats_of_a_gpt2_run_and_their_check(case, gpt2, capsys):
    run, whole = (case(gpt2, save={"save_fake": asked}, eval=QUIET) for asked in (False, True))
    for one in (run, whole):
        one.compress()
    assert main(["export", "--from", str(run.save_path), "--to", "fake"]) == 0
    assert run.written() == whole.written()
    fake = run.save_path / FAKE
    assert main(["verify", str(fake), "--against", str(gpt2)]) in (0, 1)
    capsys.readouterr()
    assert main(["verify", str(fake)]) == 0, capsys.readouterr().out


def test_a_gpt2_run_resumes_from_its_dense_folder(case, gpt2):
    run, calm = (case(gpt2, "GPTQ", base={"checkpoint_every": 1}, save={"save_vllm": False}) for _ in range(2))
    calm.compress()
    kill_behind_block(run, 2)
    run.compress()
    assert run.written() == calm.written()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant": FP8, "save": {"save_fake": False}}, ["transformer.h.0.attn.c_attn", "save_vllm stores them"]),
        ({"ignored_layers": {"layer_names": ["c_fc"]}}, ["transformer.h.0.mlp.c_fc", "save_vllm"]),
        (
            {
                "ignored_layers": {"layer_names": ["c_fc"]},
                "save": {"save_vllm": False, "save_autogptq": True},
                "quant": {"weight": W4},
            },
            ["transformer.h.0.mlp.c_fc", "save_autogptq"],
        ),
    ],
)
def test_what_loaders_of_a_gpt2_would_transpose_is_refused(case, gpt2, capsys, changes, said):
    assert main([*case(gpt2, **changes).arguments, "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert all(words in message for words in [*said, "transpose"])


# --- refused ---------------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, ["already quantized (gptq)", "GPTQ", "original"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["AWQ's format", "can't be an input", "model.path"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["bitsandbytes", "original"]),
        ({"quantization_config": {"quant_method": "modelopt"}}, ["ModelOpt", "original"]),
        ({"quantization_config": {"quant_method": "quark"}}, ["Quark", "original"]),
        ({"quantization_config": {"quant_method": "hqq"}}, ["HQQ", "original"]),
        ({"quantization_config": {"quant_method": "zip"}}, ["(zip)", "llmc doesn't know"]),
        ({"quantization_config": {"load_in_4bit": True}}, ["unknown method", "original"]),
        ({"model_type": "zebra"}, ["doesn't know the architecture 'zebra'", "model_type"]),
        (
            {"model_type": "zebra", "transformers_version": "99.1.0"},
            ["'zebra'", "Transformers 99.1.0 wrote the file", "newer"],
        ),
        ({"model_type": "zebra", "auto_map": {"AutoConfig": "a.B"}}, ["auto_map", "model.trust_remote_code: True"]),
        ({"is_encoder_decoder": True}, ["is an encoder-decoder (llama)", "decoder-only"]),
        ({"model_type": "t5", "is_encoder_decoder": True}, ["encoder-decoder (t5)"]),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_an_input(case, damaged, capsys, changes, said):
    edit(damaged, **changes)
    run = case(damaged)
    assert main([*run.arguments, "--dry-run"]) == 2
    message = capsys.readouterr().err
    for words in said:
        assert words in message
    assert not run.save_path.exists()


def test_a_modelopt_folder_is_known_by_its_other_file(case, damaged, capsys):
    (damaged / "hf_quant_config.json").write_text("{}")
    assert main([*case(damaged).arguments, "--dry-run"]) == 2
    assert "ModelOpt" in capsys.readouterr().err


def test_remote_code_runs_with_consent(case, damaged, capsys):
    (damaged / "own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass Own(LlamaConfig):\n    model_type = 'zebra'\n"
    )
    edit(damaged, model_type="zebra", auto_map={"AutoConfig": "own.Own"})
    run = case(damaged, model={"trust_remote_code": True})
    assert main([*run.arguments, "--dry-run"]) == 2
    assert "can't make a causal language model" in capsys.readouterr().err


def test_a_scale_that_is_missing_is_named_before_anything_is_written(case, exported, tmp_path, capsys):
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight_scale"]
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    run = case(broken)
    assert main(run.arguments) == 2
    assert "model.layers.1.mlp.up_proj.weight_scale" in capsys.readouterr().err
    assert not run.save_path.exists()


def test_what_the_folder_says_is_what_is_in_it(case, gpt2):
    run = case(gpt2, eval=QUIET)
    run.compress()
    tensors = {name: t for file in (run.save_path / FAKE).glob("*.safetensors") for name, t in load_file(file).items()}
    model = reload(run.save_path / FAKE)
    for name, tensor in model.state_dict().items():
        if name in tensors:
            assert torch.equal(tensor, tensors[name].float()), name
