"""A shard is whole or not there, and is what the journal says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmc.errors import RunError
from llmc.quant import UnitRecord
from llmc.stream.sink import Sink

UNITS = ["embed", "block-0", "head"]


class Plain:
    """Stores plain tensors as they are."""

    name = "plain"

    def tensors(self, unit: UnitRecord) -> dict[str, torch.Tensor]:
        return unit.plain

    def read(self, tensors: dict[str, torch.Tensor]) -> UnitRecord:
        return UnitRecord(plain=tensors)


def record(value: float) -> UnitRecord:
    return UnitRecord(plain={f"w{value}": torch.full((3, 2), value), f"b{value}": torch.ones(2, dtype=torch.bfloat16)})


@pytest.fixture
def sink(tmp_path) -> Sink:
    return Sink(tmp_path, Plain(), UNITS, lambda path, record: None)


def test_shards_are_numbered_by_unit(sink):
    assert [sink.shard(unit).name for unit in UNITS] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_what_is_written_can_be_read_back(sink):
    written = sink.write("block-0", record(1.0))
    assert written["names"] == ["b1.0", "w1.0"]
    assert written["bytes"] == 3 * 2 * 4 + 2 * 2
    assert json.loads(json.dumps(written)) == written
    back = sink.read("block-0", written)
    assert back.plain.keys() == {"w1.0", "b1.0"}
    assert torch.equal(back.plain["w1.0"], torch.full((3, 2), 1.0))


def test_a_tensor_that_is_a_view_is_stored(sink):
    written = sink.write("head", UnitRecord(plain={"t": torch.arange(6.0).reshape(2, 3).T}))
    assert torch.equal(sink.read("head", written).plain["t"], torch.arange(6.0).reshape(2, 3).T)


def test_a_unit_without_tensors_has_a_shard_too(sink):
    written = sink.write("head", UnitRecord())
    assert sink.read("head", written).plain == {}


def test_a_crash_before_the_rename_leaves_nothing_behind_the_next_write(sink, monkeypatch):
    def crash(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", crash)
        sink.write("embed", record(1.0))
    (left,) = sink.folder.iterdir()
    assert left.is_dir()
    (left / ".tmpA1b2C3").touch()  # safetensors' own, when it's killed
    sink.write("embed", record(2.0))
    assert [file.name for file in sink.folder.iterdir()] == [sink.shard("embed").name]
    assert load_file(sink.shard("embed")).keys() == {"w2.0", "b2.0"}


def test_a_crash_while_a_shard_is_written_again_keeps_the_old_one(sink, monkeypatch):
    written = sink.write("embed", record(1.0))

    def crash(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", crash)
        sink.write("embed", record(2.0))
    assert sink.read("embed", written).plain.keys() == {"w1.0", "b1.0"}


def test_a_shard_that_fails_its_check_is_not_reported(tmp_path):
    def refuse(path, record):
        raise ValueError(f"{path.name} isn't what was to be written")

    with pytest.raises(ValueError, match="model-00001-of-00003"):
        Sink(tmp_path, Plain(), UNITS, refuse).write("embed", record(1.0))


def test_a_changed_shard_is_refused(sink):
    written = sink.write("embed", record(1.0))
    path = sink.shard("embed")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="missing or isn't what the interrupted run wrote"):
        sink.read("embed", written)


def test_a_missing_shard_is_refused(sink):
    written = sink.write("embed", record(1.0))
    sink.shard("embed").unlink()
    with pytest.raises(RunError, match=r"model-00001-of-00003\.safetensors is missing"):
        sink.read("embed", written)


def test_the_index_names_every_tensor_with_its_shard_and_the_total_size(sink):
    rows = [{"outputs": {"plain": sink.write(unit, record(float(i)))}} for i, unit in enumerate(UNITS)]
    sink.write_index(rows)
    index = json.loads((sink.folder / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in sink.folder.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    assert index["metadata"] == {"total_size": total}
