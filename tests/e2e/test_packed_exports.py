"""Whole runs into AutoAWQ's, GPTQ's, MLC-LLM's and LightLLM's folders: each holds the evaluated model, also resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, write_tokenizer
from test_pipeline import FAKE, VLLM, same_logits, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import llmc
from llmc.algorithms import options_types
from llmc.cli import main
from llmc.config import load_config
from llmc.prepare import prepare
from llmc.run import Silent

FOLDERS = {
    "save_autoawq": "autoawq_quant_model",
    "save_autogptq": "autogptq_quant_model",
    "save_mlcllm": "mlcllm_quant_model",
    "save_lightllm": "lightllm_quant_model",
}
ASYM = {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 32}
SYM = {**ASYM, "symmetric": True}
SYM8 = {**SYM, "bit": 8}
ROWS = {"bit": 4, "symmetric": True, "granularity": "per_channel", "group_size": None}
G128 = {**ASYM, "group_size": 128}
INT8 = {"bit": 8, "symmetric": True, "granularity": "per_channel", "group_size": None}
TOKEN = {"bit": 8, "symmetric": True, "granularity": "per_token"}
SAME_BITS = "{bit: 4, symmetric: true, granularity: per_channel}"
FP8 = {"bit": "e4m3", "symmetric": True, "granularity": "per_block", "block_size": 128, "group_size": None}
GROUPS = {"bit": "e4m3", "symmetric": True, "granularity": "per_group", "group_size": 128}


def nibbles(words: Tensor) -> Tensor:
    return ((words[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(-2)


def spread(qparams: Tensor, columns: int) -> Tensor:
    return qparams.repeat_interleave(columns // qparams.shape[0], 0)


def awq(own: dict[str, Tensor]) -> Tensor:
    straight = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    words, zeros = (
        nibbles(own[part]).unflatten(-1, (-1, 8))[..., straight].flatten(-2) for part in ("qweight", "qzeros")
    )
    return ((words - spread(zeros, len(words))) * spread(own["scales"], len(words))).T


def gptq(own: dict[str, Tensor]) -> Tensor:
    bits = 32 * own["qweight"].shape[0] // own["g_idx"].numel()
    words = (own["qweight"][:, None] >> torch.arange(0, 32, bits)[:, None]) & (2**bits - 1)
    return ((words.flatten(0, 1) - 2 ** (bits - 1)) * own["scales"][own["g_idx"].long()]).T


def fp8(own: dict[str, Tensor]) -> Tensor:
    inverse = own["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return own["weight"].float() * inverse


def dense(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A Linear's weight by whichever layout its tensors have."""
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    reader = gptq if "g_idx" in own else awq if "qweight" in own else fp8 if "weight_scale_inv" in own else None
    return own["weight"] if reader is None else reader(own)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks whose widths 128 divides."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=208, max_position_embeddings=64, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def packed(case: Callable[..., Case]) -> Callable[..., Case]:
    """Makes runs into one of the folders and that of ``save_fake``."""

    def make(into: str, method: Any, weight: dict[str, Any], act: dict[str, Any] | None = None, **changes: Any) -> Case:
        save = {"save_vllm": False, into: True, **changes.pop("save", {})}
        return case(method=method, quant={"weight": weight, "act": act}, save=save, eval={"eval_pos": []}, **changes)

    return make


def check(run: Case, save: str) -> None:
    """The folder's weights are those of ``save_fake``, bit for bit, and nothing is missing."""
    original, fake = tensors_of(run.source), tensors_of(run.save_path / FAKE)
    stored = tensors_of(run.save_path / FOLDERS[save])
    linears = [name.removesuffix(".weight") for name in original if original[name].ndim == 2 and "layers" in name]
    for name in linears:
        assert torch.equal(dense(stored, name).to(fake[f"{name}.weight"].dtype), fake[f"{name}.weight"]), name
    own = {
        f"{name}.{part}"
        for name in linears
        for part in ("weight", "weight_scale_inv", "qweight", "qzeros", "scales", "g_idx")
    }
    assert stored.keys() - own == fake.keys() - own
    for name in stored.keys() - own:
        assert torch.equal(stored[name], fake[name])
    index = json.loads((run.save_path / FOLDERS[save] / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys()


@pytest.mark.parametrize(
    ("save", "method", "weight", "family"),
    [
        ("save_autoawq", "RTN", ASYM, "opt"),
        ("save_autoawq", "Awq", ASYM, "llama-tied"),
        ("save_autoawq", "GPTQ", SYM, "qwen2"),
        ("save_autoawq", ["Awq", "OmniQuant"], ASYM, "llama"),
        ("save_autoawq", "RTN", ROWS, "llama"),
        ("save_autogptq", "GPTQ", SYM, "opt"),
        ("save_autogptq", "GPTQ", SYM8, "llama"),
        ("save_autogptq", ["Quarot", "GPTQ"], ROWS, "llama"),
        ("save_lightllm", "Awq", ASYM, "qwen2"),
    ],
)
def test_the_folder_is_the_evaluated_model(packed, source_of, save, method, weight, family):
    options = {"OmniQuant": {"epochs": 1}} if "OmniQuant" in method else {}
    run = packed(save, method, weight, checkpoint=source_of(family))
    run.content["quant"]["special"] = options
    result = run.compress()
    check(run, save)
    stored = tensors_of(run.save_path / FOLDERS[save])
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith(".scales")} == {torch.float16}
    config = json.loads((run.save_path / FOLDERS[save] / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == ("gptq" if "gptq" in save else "awq")
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    assert str(run.save_path / FOLDERS[save]) in result.outputs[save]["serve"]


@pytest.mark.parametrize(
    ("save", "method", "weight", "act"),
    [
        ("save_mlcllm", "Awq", G128, None),
        ("save_lightllm", "GPTQ", FP8, GROUPS),
        ("save_lightllm", "RTN", INT8, TOKEN),
        ("save_lightllm", ["SmoothQuant"], INT8, TOKEN),
    ],
)
def test_the_folder_of_a_wide_model_is_the_evaluated_model(packed, wide, save, method, weight, act):
    run = packed(save, method, weight, act, checkpoint=wide)
    run.compress()
    check(run, save)
    stored = tensors_of(run.save_path / FOLDERS[save])
    if weight == INT8:
        assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


def test_several_formats_of_one_run_hold_the_same_weights(packed):
    both = {"save_vllm": True, "save_autogptq": True, "save_lightllm": True}
    run = packed("save_autoawq", "GPTQ", SYM, save=both)
    run.compress()
    for save in ("save_autoawq", "save_autogptq", "save_lightllm"):
        check(run, save)
    assert same_logits(run, VLLM, FAKE)


@pytest.mark.parametrize("save", ["save_autoawq", "save_autogptq"])
def test_ignored_linears_are_stored_as_they_were(packed, save):
    run = packed(save, "GPTQ", SYM, ignored_layers={"layer_names": ["mlp.down_proj"], "block_ids": [1]})
    run.compress()
    check(run, save)
    name = "model.layers.1.mlp.down_proj"
    original, stored = tensors_of(run.source), tensors_of(run.save_path / FOLDERS[save])
    assert torch.equal(stored[f"{name}.weight"], original[f"{name}.weight"])
    config = json.loads((run.save_path / FOLDERS[save] / "config.json").read_text())["quantization_config"]
    kept = config["modules_to_not_convert"] if save == "save_autoawq" else [*config["dynamic"]]
    assert len(kept) == 1
    assert "down_proj" in kept[0]


@pytest.mark.parametrize(
    ("save", "method", "weight", "act"),
    [("save_autoawq", "Awq", ASYM, None), ("save_autogptq", "GPTQ", SYM8, None), ("save_lightllm", "RTN", INT8, TOKEN)],
)
def test_killed_and_resumed_it_writes_the_same_bytes(packed, save, method, weight, act):
    calm, killed = (packed(save, method, weight, act, base={"checkpoint_every": 1}) for _ in range(2))
    calm.compress()

    class Killed(BaseException):
        pass

    class Fatal(Silent):
        def block(self, index, row):
            if index == 1:
                raise Killed

    with pytest.raises(Killed):
        llmc.compress(killed.content, listener=Fatal())
    assert not (killed.save_path / FOLDERS[save] / "config.json").exists()
    killed.compress()
    assert killed.written() == calm.written()


@pytest.mark.parametrize(
    ("save", "weight", "act"),
    [("save_autoawq", ASYM, None), ("save_autogptq", SYM8, None), ("save_lightllm", INT8, TOKEN)],
)
def test_the_plan_knows_how_much_will_be_written(packed, save, weight, act):
    run = packed(save, "RTN", weight, act, save={"save_fake": False})
    run.compress()
    stored = tensors_of(run.save_path / FOLDERS[save])
    prepared = prepare(load_config(run.content, ["save.save_path=elsewhere"], options_types()))
    (exporter,), names = prepared.exporters, {layer.name for layer in prepared.layers}
    linears = sum(exporter.nbytes(layer) for layer in prepared.layers)
    assert linears == sum(tensor.nbytes for name, tensor in stored.items() if name.rpartition(".")[0] in names)


@pytest.mark.parametrize(
    ("save", "family", "changes", "said"),
    [
        ("save_mlcllm", "mistral", ["quant.weight.group_size=64"], ["save_mlcllm", "takes llama", "mistral"]),
        ("save_autoawq", "llama", ["quant.weight.bit=3"], ["save_autoawq", "bit: 4"]),
        ("save_autoawq", "llama", ["quant.weight.scale_dtype=bfloat16"], ["float16", "quant.weight.scale_dtype"]),
        (
            "save_autoawq",
            "llama",
            [f"quant.mix_bits={{down: {{layer_name: [down_proj], weight: {SAME_BITS}}}}}"],
            ["quant.mix_bits", "save_autoawq", "one scheme"],
        ),
        (
            "save_autoawq",
            "llama",
            ["ignored_layers={layer_names: [self_attn.q_proj]}"],
            ["q_proj", "k_proj", "ignored_layers"],
        ),
        ("save_lightllm", "llama", ["quant.weight.bit=8"], ["save_lightllm", "bit: 4"]),
        (
            "save_autogptq",
            "llama",
            [
                "quant.weight.symmetric=true",
                "quant.method=GPTQ",
                "quant.special={actorder: true, static_groups: false}",
            ],
            ["actorder", "save_autogptq", "static_groups: true"],
        ),
    ],
)
def test_what_a_format_can_not_hold_is_refused_before_anything_is_read(
    packed, source_of, capsys, save, family, changes, said
):
    run = packed(save, "RTN", ASYM, checkpoint=source_of(family))
    assert main([*run.arguments, *(part for change in changes for part in ("--set", change))]) == 2
    message = capsys.readouterr().err
    assert [part for part in said if part not in message] == [], message
    assert not run.save_path.exists()


def test_w8a8_that_lightllm_would_round_differently_stops_with_the_name_of_the_linear(packed, capsys):
    run = packed("save_lightllm", "GPTQ", INT8, TOKEN)
    assert main(run.arguments) == 2
    message = capsys.readouterr().err
    assert "model.layers.0.self_attn" in message
    assert "would find other codes" in message
    assert not (run.save_path / FOLDERS["save_lightllm"] / "config.json").exists()
