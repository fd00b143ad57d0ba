from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmc.errors import CheckpointError
from llmc.models import convert
from llmc.models.convert import cache_root, convert_bin, convert_gguf


def tiny(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def save_bin(model: LlamaForCausalLM, folder: Path, shards: int = 1) -> Path:
    """Save as the .bin checkpoints of old: one file, or shards with an index."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"\x00pieces")
    (folder / "vocab.json").write_text("{ }")
    (folder / "training_args.bin").write_bytes(b"junk")
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {name: tensor.clone() for name, tensor in list(state.items())[i::shards]}
        torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_keeps_every_tensor_and_side_file(tmp_path, shards):
    model = tiny()
    source = save_bin(model, tmp_path / "old", shards)
    made = convert_bin(source, tmp_path / "cache")
    assert made.parent == tmp_path / "cache" / "converted" and made.name.startswith("old-")
    state, found = model.state_dict(), read(made)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    names = {file.name for file in made.iterdir()}
    assert {"config.json", "tokenizer.model", "vocab.json"} <= names
    assert not any(name.endswith(".bin") or "pytorch" in name for name in names)
    for name in ("config.json", "tokenizer.model", "vocab.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    reloaded = LlamaForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), model.parameters(), strict=True))


def test_a_second_run_reuses_and_a_changed_source_does_not(tmp_path):
    source = save_bin(tiny(), tmp_path / "old")
    first = convert_bin(source, tmp_path / "cache")
    time = (first / "model.safetensors").stat().st_mtime_ns
    assert convert_bin(source, tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == time
    os.utime(source / "pytorch_model.bin", ns=(1, 1))
    assert convert_bin(source, tmp_path / "cache") != first


def test_tied_embeddings_are_written_once_and_other_aliases_twice(tmp_path):
    tied = save_bin(tiny(tied=True), tmp_path / "tied")
    assert "lm_head.weight" not in read(convert_bin(tied, tmp_path / "cache"))
    other = save_bin(tiny(), tmp_path / "other")
    shared = torch.arange(64.0)
    state = {"a": shared, "b": shared, "slice": shared[8:16], "across": shared.view(8, 8).T, "none": torch.empty(0)}
    torch.save(state, other / "pytorch_model.bin")
    found = read(convert_bin(other, tmp_path / "cache"))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_format_before_zip_files(tmp_path):
    source = save_bin(tiny(), tmp_path / "old")
    state = {"a": torch.arange(5)}
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read(convert_bin(source, tmp_path / "cache"))["a"], state["a"])


class Payload:
    """An object that would run code if it were unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("payload-was-run",))


def test_objects_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = save_bin(tiny(), tmp_path / "old")
    torch.save({"a": torch.zeros(1), "b": Payload()}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin holds more than tensors.*never unpickles"):
        convert_bin(source, tmp_path / "cache")
    assert not (tmp_path / "payload-was-run").exists()
    assert list((tmp_path / "cache" / "converted").glob("[!.]*")) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [([1], "holds list, not a state dict"), ({"epoch": 3}, "the entry 'epoch' is int, not a tensor")],
)
def test_files_that_are_no_state_dict(tmp_path, content, says):
    source = save_bin(tiny(), tmp_path / "old")
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=says):
        convert_bin(source, tmp_path / "cache")


def test_damaged_and_missing_shards(tmp_path):
    source = save_bin(tiny(), tmp_path / "old", shards=3)
    shard = source / "pytorch_model-00002-of-00003.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.bin is damaged"):
        convert_bin(source, tmp_path / "cache")
    torch.save({"other": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match=r"00002-of-00003.bin lacks "):
        convert_bin(source, tmp_path / "cache")
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 3 shards .*00002-of-00003.bin"):
        convert_bin(source, tmp_path / "cache")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="isn't an index"):
        convert_bin(source, tmp_path / "cache")


def test_a_killed_conversion_leaves_nothing_in_place(tmp_path):
    source = save_bin(tiny(), tmp_path / "old", shards=3)
    program = (
        "import os, signal, sys; from pathlib import Path; from llmc.models import convert\n"
        "save, done = convert.save_file, []\n"
        "def killing(*args, **options):\n"
        "    save(*args, **options); done.append(1)\n"
        "    if len(done) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert.save_file = killing\n"
        "convert.convert_bin(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    path = os.pathsep.join([str(Path(convert.__file__).parents[2]), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "cache")], env=os.environ | {"PYTHONPATH": path}
    )
    assert ran.returncode == -signal.SIGKILL
    converted = tmp_path / "cache" / "converted"
    assert len(list(converted.glob(".*.partial/*.safetensors"))) == 2
    assert not list(converted.glob("[!.]*"))
    made = convert_bin(source, tmp_path / "cache")
    assert read(made).keys() == tiny().state_dict().keys()
    assert not list(converted.glob(".*.partial"))


def test_where_conversions_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_root(Path("x")) == Path("x")
    monkeypatch.delenv("LLMC_CACHE")
    assert cache_root() == Path.home() / ".cache" / "llmc"


def write_gguf(model: LlamaForCausalLM, file: Path) -> None:
    """Write a llama GGUF in float16 with a byte-level vocabulary of 32 tokens."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "Ġ", *(chr(97 + i) for i in range(26)), "ab", "abc", "<unk>"])
    writer.add_token_types([3, 3, *[1] * 29, 3])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(31)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        target = names.get_name(stem)
        data = tensor.float()
        for part, count in heads.items():
            if target.endswith(part):  # GGUF stores rotary pairs side by side
                data = data.view(count, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        dtype = numpy.float32 if data.ndim == 1 else numpy.float16
        writer.add_tensor(f"{target}.{kind}", data.numpy().astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_an_ordinary_folder_quietly(tmp_path, capfd):
    model = tiny()
    state = {name: tensor.half().bfloat16() for name, tensor in model.state_dict().items()}
    write_gguf(model, tmp_path / "tiny.F16.gguf")
    capfd.readouterr()
    made = convert_gguf(tmp_path / "tiny.F16.gguf", tmp_path / "cache")
    assert capfd.readouterr() == ("", "")
    assert made.name.startswith("tiny.F16-")
    found = read(made)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    config = json.loads((made / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [30]
    other = convert_gguf(tmp_path / "tiny.F16.gguf", tmp_path / "cache", torch.float32)
    assert other != made and read(other)["lm_head.weight"].dtype == torch.float32


def test_a_gguf_that_is_none(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF????")
    with pytest.raises(CheckpointError, match=r"can't read .*a.gguf as GGUF"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "cache")
