"""Tensors come whole, once, and ahead of time."""

from __future__ import annotations

import io
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.errors import CheckpointError
from llmc.stream import source as source_module
from llmc.stream.headers import read_headers
from llmc.stream.source import BlockSource

STORED = {
    "first": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def source(tmp_path):
    save_file(STORED, tmp_path / "model.safetensors")
    entries = read_headers(tmp_path)
    made = BlockSource({"a": [entries["first"], entries["scalar"]], "b": [entries["half"], entries["empty"]]})
    yield made
    made.close()


def test_tensors_come_in_their_stored_dtype_and_shape(source):
    found = source.take("a") | source.take("b")
    assert found.keys() == STORED.keys()
    for name, tensor in STORED.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_the_tensors_are_fresh_memory_that_may_be_written(source, tmp_path):
    taken = source.take("a")
    taken["first"].zero_()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["first"], STORED["first"])
    assert torch.equal(source.take("a")["first"], STORED["first"])
    assert not taken["first"].any()


def test_prefetch_reads_in_a_thread_and_only_once(source, monkeypatch):
    threads = []
    read = source._read
    monkeypatch.setattr(source, "_read", lambda unit: threads.append(threading.get_ident()) or read(unit))
    source.prefetch("b")
    source.prefetch("b")
    assert torch.equal(source.take("b")["half"], STORED["half"])
    assert source.reads == {"half": 1, "empty": 1}
    assert len(threads) == 1
    assert threads != [threading.get_ident()]


def test_a_prefetched_unit_is_complete_before_it_is_asked_for(source, tmp_path):
    source.prefetch("a")
    source._ahead["a"].result()
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(source.take("a")["first"], STORED["first"])


def test_an_unknown_unit_is_not_prefetched(source):
    source.prefetch("z")
    assert source.reads == {}


def test_counts_what_it_reads(source):
    source.take("a")
    assert source.bytes_read == 12 * 4 + 8
    source.take("b")
    assert source.bytes_read == sum(tensor.nbytes for tensor in STORED.values())


def test_a_short_read_goes_on_where_it_stopped():
    class Trickle(io.BytesIO):
        def readinto(self, target) -> int:
            return super().readinto(target[:3])

    target = bytearray(10)
    assert source_module._fill(Trickle(b"0123456789"), memoryview(target))
    assert target == b"0123456789"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_file_that_became_shorter_is_named(source, tmp_path, ahead):
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    if ahead:
        source.prefetch("b")
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends within half: it became shorter"):
        source.take("b")
