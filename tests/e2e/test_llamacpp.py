"""GGUF files of whole runs: what is in them is what was evaluated, and what can't be in them is refused beforehand."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from cases import Case, write_pieces
from real import real_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma2Config, MixtralConfig

from llmc.algorithms import options_types
from llmc.cli import main
from llmc.config import load_config
from llmc.errors import ConfigError, ExportError
from llmc.export import Source, gguf_file, llamacpp
from llmc.export.gguf_tokenizer import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary
from llmc.prepare import prepare

SAVED = {"save_vllm": False, "save_fake": True, "save_llamacpp": True}
FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]


def written(run: Case) -> gguf.GGUFReader:
    return gguf.GGUFReader(run.save_path / "llamacpp_quant_model" / "model.gguf")


def weights(run: Case) -> dict[str, torch.Tensor]:
    """Of the file, dequantized by the gguf package."""
    return {
        one.name: torch.from_numpy(np.array(gguf.quants.dequantize(one.data, one.tensor_type)))
        for one in written(run).tensors
    }


def types(run: Case) -> dict[str, str]:
    return {one.name: one.tensor_type.name for one in written(run).tensors}


def evaluated(run: Case) -> dict[str, torch.Tensor]:
    """Of the fake-quantized folder, under llama.cpp's names and in its order of rows."""
    folder = run.save_path / "fake_quant_model"
    config = AutoConfig.from_pretrained(folder)
    known = gguf.MODEL_ARCH.QWEN3 if config.model_type == "qwen3" else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module = name.rsplit(".", 2)[-2]
            if config.model_type in ("llama", "mistral") and module in ("q_proj", "k_proj"):
                heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
                # As the converter of llama.cpp does it.
                tensor = tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
            found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor.float()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_holds_the_evaluated_weights_and_nothing_else(case, pieced, family):
    weight = {"bit": 4, "symmetric": family != "qwen2", "granularity": "per_group", "group_size": 32}
    run = case(pieced(family), save=SAVED, quant={"weight": weight}, eval={"eval_pos": []})
    scheme = run.compress().metrics["scheme"]
    assert (scheme["scale_dtype"], scheme["exact_product"]) == ("float16", True)
    expected, found = evaluated(run), weights(run)
    assert found.keys() == expected.keys()
    assert ("output.weight" in found) == (family != "llama-tied")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    kinds = types(run)
    assert {kinds[name] for name in kinds if "ffn_" in name and "norm" not in name} == {
        "Q5_0" if family == "qwen2" else "Q4_0"
    }
    assert {kinds[name] for name in kinds if "norm" in name or "bias" in name} == {"F32"}
    assert kinds["token_embd.weight"] == "BF16"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_finished_run_for_vllm_becomes_a_file_with_its_codes(case, pieced, family, capsys):
    weight = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 32}
    run = case(pieced(family), quant={"weight": weight}, eval={"eval_pos": []})
    run.compress()
    assert main(["export", "--from", str(run.save_path), "--to", "llamacpp"]) == 0
    assert "evaluated in bfloat16, are rounded to float32" in " ".join(capsys.readouterr().out.split())
    expected, found = evaluated(run), weights(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].bfloat16().float(), tensor) for name, tensor in expected.items())
    assert set(types(run).values()) == {"Q4_0", "BF16", "F32"}
    folder = run.save_path / "llamacpp_quant_model"
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_the_parts_are_gone_and_the_folder_has_the_side_files(case, pieced):
    run = case(pieced("llama"), save={**SAVED, "save_fake": False}, eval={"eval_pos": []})
    outputs = run.compress().outputs
    folder = run.save_path / "llamacpp_quant_model"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.gguf",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    left = {path.name for path in run.save_path.iterdir()}
    assert left == {"llamacpp_quant_model", "metrics.json", "report.html"}
    assert outputs["save_llamacpp"]["serve"] == f"llama-server -m {folder}/model.gguf"
    assert outputs["save_llamacpp"]["bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_the_metadata_are_the_models_and_the_tokenizers(case, pieced):
    run = case(pieced("llama"), save=SAVED, eval={"eval_pos": []})
    run.compress()
    found = {name: field.contents() for name, field in written(run).fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q5_0,
        "llama.block_count": 4,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 208,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert {name: found[name] for name in expected} == expected
    tokens, kinds, scores = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    assert len(tokens) == len(kinds) == len(scores) == 208
    assert tokens[:4] == ["<unk>", "<s>", "▁w0", "▁w1"]
    assert kinds[:3] == [UNKNOWN, CONTROL, 1]
    assert tokens[-1] == "[PAD207]"
    assert kinds[-1] == UNUSED


def test_each_layer_gets_the_type_of_its_own_grid(case, pieced):
    eight = {"layer_name": ["down_proj"], "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"}}
    four = {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 64, "scale_digits": 7}
    run = case(
        pieced("llama"),
        save=SAVED,
        quant={"weight": four, "mix_bits": {"setting_0": eight}},
        ignored_layers={"layer_names": ["self_attn.o_proj"], "block_ids": [2]},
        eval={"eval_pos": []},
    )
    run.compress()
    kinds = types(run)
    assert {kinds[f"blk.{index}.ffn_down.weight"] for index in range(4)} == {"Q8_0"}
    assert {kinds[f"blk.{index}.attn_output.weight"] for index in (0, 1, 3)} == {"Q4_1"}
    assert kinds["blk.2.attn_output.weight"] == "BF16"
    expected, found = evaluated(run), weights(run)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_rotated_model_gets_its_own_head_and_a_shorter_one_fewer_blocks(case, pieced):
    saved = {"save_vllm": False, "save_llamacpp": True, "save_fake": True}
    shorter = {"method": "ShortGPT", "weight": {"n_prune_layers": 1}}
    run = case(pieced("llama-tied"), method=["Quarot", "RTN"], sparse=shorter, save=saved, eval={"eval_pos": []})
    run.compress()
    found, expected = weights(run), evaluated(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(found["output.weight"], found["token_embd.weight"])
    assert written(run).fields["llama.block_count"].contents() == 3


def test_one_tensor_is_in_memory_at_a_time(case, pieced, monkeypatch):
    alive: list[weakref.ref] = []
    load = gguf_file._load

    def watched(*arguments):
        assert not [one for one in alive if one() is not None]
        array = load(*arguments)
        alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(gguf_file, "_load", watched)
    run = case(pieced("llama"), save={**SAVED, "save_fake": False}, eval={"eval_pos": []})
    outputs = run.compress().outputs
    assert len(alive) == len(types(run)) == outputs["save_llamacpp"]["tensors"] == 4 * 9 + 3


@pytest.mark.parametrize("family", ["mixtral", "gemma2"])
def test_experts_are_stacked_and_gemmas_norms_shifted(family, tmp_path):
    shape = {"vocab_size": 208, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = MixtralConfig(**shape, num_local_experts=3)
    if family == "gemma2":
        config = Gemma2Config(**shape, query_pre_attn_scalar=16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    write_pieces(tmp_path)
    gguf_file.write_gguf([tmp_path / "model.safetensors"], Source(tmp_path, config.to_dict()), tmp_path / "m.gguf")
    found = {one.name: torch.from_numpy(np.array(one.data)) for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    block = model.model.layers[1]
    if family == "gemma2":
        assert torch.equal(found["blk.1.post_ffw_norm.weight"], block.post_feedforward_layernorm.weight + 1)
        assert torch.equal(found["output_norm.weight"], model.model.norm.weight + 1)
        return
    experts = block.mlp.experts
    gate_up = torch.cat([found["blk.1.ffn_gate_exps.weight"], found["blk.1.ffn_up_exps.weight"]], 1)
    assert gate_up.shape == (3, 128, 32)
    assert torch.equal(gate_up, experts.gate_up_proj)
    assert torch.equal(found["blk.1.ffn_down_exps.weight"], experts.down_proj)
    assert torch.equal(found["blk.1.ffn_gate_inp.weight"], block.mlp.gate.weight)


# --- refused beforehand ----------------------------------------------------------------------------------------------

SYM8 = {"bit": 8, "symmetric": True, "granularity": "per_token"}
CACHE = {"method": "Naive", "bit": 8, "symmetric": True, "granularity": "per_token"}


@pytest.mark.parametrize(
    ("weight", "problem", "remedy"),
    [
        ({"bit": 8}, "W8 g32 asym, scales in float16,", "W8 g32 sym"),
        ({"group_size": 16}, "W4 g16 asym", "W4 g32 asym"),
        ({"symmetric": True, "scale_dtype": "bfloat16"}, "scales in bfloat16", "scales in float16"),
        ({"bit": "e4m3", "symmetric": True, "granularity": "per_channel", "group_size": None}, "W8 e4m3", "W8 channel"),
    ],
)
def test_a_scheme_without_a_type_is_refused_with_the_nearest_that_has_one(case, pieced, weight, problem, remedy):
    run = case(pieced("llama"), save=SAVED)
    run.content["quant"]["weight"] |= weight
    with pytest.raises(ExportError) as error:
        run.compress()
    assert "save_llamacpp: no type of GGUF" in error.value.message
    assert problem in error.value.message
    assert remedy in error.value.remedy
    assert not run.save_path.exists()


@pytest.mark.parametrize(
    ("quant", "problem"),
    [({"act": SYM8}, "rounds activations by itself"), ({"kvcache": CACHE}, "chooses the KV cache's type")],
)
def test_what_llama_cpp_rounds_by_itself_is_refused(case, pieced, quant, problem):
    weight = {"bit": 8, "symmetric": True, "granularity": "per_channel"}
    with pytest.raises(ExportError, match=problem):
        case(pieced("llama"), save=SAVED, quant={"weight": weight, **quant}).compress()


def test_a_backend_that_multiplies_otherwise_needs_a_run_of_its_own(case, pieced):
    with pytest.raises(ConfigError, match="save_llamacpp's backend multiplies codes and scales in float32") as error:
        case(pieced("llama"), save={**SAVED, "save_vllm": True}).compress()
    assert "two runs" in error.value.remedy


def test_an_unknown_architecture_is_refused(case, pieced):
    with pytest.raises(ExportError, match="the architecture 'opt'"):
        case(pieced("opt"), save=SAVED).compress()


def test_without_the_gguf_package_nothing_starts(case, pieced, monkeypatch):
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="needs the package gguf") as error:
        case(pieced("llama"), save=SAVED).compress()
    assert "pip install" in error.value.remedy


def test_a_tokenizer_that_gguf_does_not_know_is_refused(case, source):
    with pytest.raises(ExportError, match=r"neither a byte-level BPE in tokenizer.json nor .* tokenizer.model"):
        case(source, save=SAVED).compress()


def test_pieces_without_bytes_are_told(case, pieced):
    run = case(pieced("mistral"), save=SAVED)
    warnings = prepare(load_config(run.content, methods=options_types())).warnings
    assert [text for text in warnings if "no pieces for single bytes" in text]
    assert [text for text in warnings if "attends to all tokens, the model to the last 8" in text]


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_the_real_models_pre_tokenizer_is_found_by_its_fingerprint():
    folder = real_model()
    vocabulary = read_vocabulary(folder, 49152)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "smollm")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert vocabulary.tokens == theirs.convert_ids_to_tokens(range(49152))
    special = {index for index, kind in enumerate(vocabulary.types) if kind == CONTROL}
    assert special == set(theirs.added_tokens_decoder)


def test_a_changed_tokenizer_has_another_fingerprint(tmp_path):
    content = json.loads((real_model() / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-20000]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match="has no pre-tokenizer for it"):
        read_vocabulary(tmp_path, 49152)


def test_an_embedding_with_fewer_rows_than_tokens_is_refused():
    with pytest.raises(ExportError, match="has the token 49151, but the embedding only 49000 rows"):
        read_vocabulary(real_model(), 49000)


def test_tokens_beside_the_pieces_are_added_ones(pieced, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((pieced("llama") / "tokenizer.model").read_bytes())
    added = {"193": {"content": "<|end|>", "special": True}, "194": {"content": "two▁words", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    found = read_vocabulary(tmp_path, 200)
    assert list(zip(found.tokens, found.types, strict=True))[192:196] == [
        ("[PAD192]", UNUSED),
        ("<|end|>", CONTROL),
        ("two words", USER_DEFINED),
        ("[PAD195]", UNUSED),
    ]


@pytest.mark.parametrize(("change", "problem"), [("unigram", "isn't a BPE"), ("torn", "isn't a SentencePiece model")])
def test_pieces_that_llama_cpp_would_split_differently_are_refused(pieced, tmp_path: Path, change, problem):
    from sentencepiece import sentencepiece_model_pb2 as schema

    model = schema.ModelProto()
    model.ParseFromString((pieced("llama") / "tokenizer.model").read_bytes())
    model.trainer_spec.model_type = schema.TrainerSpec.UNIGRAM
    content = model.SerializeToString() if change == "unigram" else b"\xff" * 40
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ExportError, match=problem):
        read_vocabulary(tmp_path, 208)
