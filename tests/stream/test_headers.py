from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmc.errors import CheckpointError
from llmc.stream.headers import headers_digest, read_headers

TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def sharded_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    LlamaForCausalLM(TINY).to(torch.bfloat16).save_pretrained(folder, max_shard_size="4KB")
    return folder


@pytest.fixture
def sharded(sharded_model, tmp_path) -> Path:
    return Path(shutil.copytree(sharded_model, tmp_path / "model"))


def write(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file.parent


def one(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_every_tensor_of_a_sharded_model_is_where_the_entry_says(sharded):
    entries = read_headers(sharded)
    expected = {name: t for file in sharded.glob("*.safetensors") for name, t in load_file(file).items()}
    assert entries.keys() == expected.keys()
    assert len({entry.file for entry in entries.values()}) > 2
    for name, entry in entries.items():
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            found = torch.frombuffer(bytearray(stream.read(entry.nbytes)), dtype=entry.dtype).reshape(entry.shape)
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
        *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
    ],
    ids=str,
)
def test_every_dtype_that_safetensors_writes(tmp_path, dtype):
    tensor = torch.arange(96, dtype=torch.uint8).remainder(2).view(4, 24).view(dtype)
    save_file({"a": tensor, "empty": torch.empty(0, 2)}, tmp_path / "model.safetensors")
    entry = read_headers(tmp_path)["a"]
    assert (entry.dtype, entry.shape, entry.nbytes) == (dtype, tuple(tensor.shape), 96)


def test_the_digest_follows_layout_and_not_place(sharded, tmp_path):
    digest = headers_digest(read_headers(sharded))
    moved = Path(shutil.move(sharded, tmp_path / "elsewhere"))
    assert headers_digest(read_headers(moved)) == digest
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    first = headers_digest(read_headers(tmp_path))
    save_file({"a": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    assert len({digest, first, headers_digest(read_headers(tmp_path))}) == 3


def test_no_safetensors(tmp_path):
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .*only other.safetensors"):
        read_headers(tmp_path)


def test_missing_shards_are_counted_and_named(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of the {len(shards)} shards .*{shards[1].name}"):
        read_headers(sharded)


@pytest.mark.parametrize(("change", "word"), [(-10, "shorter"), (10, "longer")])
def test_a_shard_of_the_wrong_size(sharded, change, word):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(CheckpointError, match=f"{shard.name} is {word}.*{len(data) + change} bytes.*{len(data)}"):
        read_headers(sharded)


def test_a_tensor_that_its_shard_lacks(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = next(iter(content["weight_map"].values()))
    content["weight_map"]["model.ghost"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{shard} lacks 1 tensors .*model.ghost"):
        read_headers(sharded)


def test_a_tensor_that_the_index_leaves_out_is_no_part_of_the_checkpoint(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    assert "lm_head.weight" not in read_headers(sharded)


@pytest.mark.parametrize(
    ("index", "says"),
    [("{", "isn't JSON"), ("{}", "no weight_map"), ('{"weight_map": {"a": "../b"}}', "isn't a file name")],
)
def test_a_broken_index(tmp_path, index, says):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=says):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"{nope", b"", "isn't JSON"),
        (b"\xff\xfe{}", b"", "isn't JSON"),
        ([1], b"", "is list, not an object"),
        ({"a": {"dtype": "F32"}}, b"", "lacks dtype, shape or offsets"),
        (one(shape=[-1]), b"0000", "has the shape"),
        (one(shape=7), b"0000", "has the shape"),
        (one(offsets=(0, "4")), b"0000", "has the shape"),
        (one(shape=[2]), b"0000", r"can't be 4 bytes long"),
        (one("F6_E2M3", [4], (0, 3)), b"000", "F6_E2M3, which isn't supported"),
        (one("F4", [3], (0, 2)), b"00", "doesn't fill whole bytes"),
        (one(offsets=(4, 8)), b"00000000", "a leaves a hole before it"),
        (one() | {"b": one(offsets=(2, 6))["a"]}, b"000000", "b overlaps"),
    ],
)
def test_a_broken_header(tmp_path, header, data, says):
    folder = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=says) as raised:
        read_headers(folder)
    assert "model.safetensors" in raised.value.message and raised.value.remedy


def test_headers_that_are_cut_off_or_absurd(tmp_path):
    file = tmp_path / "model.safetensors"
    for content, says in [
        (b"", "0 bytes, expected at least 8"),
        ((100).to_bytes(8, "little") + b"{", "9 bytes, expected at least 108"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "more than the 100000000 allowed"),
    ]:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=says):
            read_headers(tmp_path)
