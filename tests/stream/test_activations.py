"""Streams hold the same numbers wherever they lie."""

from __future__ import annotations

import pytest
import torch

from llmc.stream.activations import ActivationStore

SHAPES = [(1, 6, 8), (2, 5, 8)]
NBYTES = sum(a * b * c for a, b, c in SHAPES) * 4
CPU = torch.device("cpu")


def filled(folder, budget, dtype=torch.float32, seed=0) -> ActivationStore:
    store = ActivationStore(folder, budget)
    generator = torch.Generator().manual_seed(seed)
    for name in ("calib.original", "eval.pretrain"):
        stream = store.add(name, SHAPES, dtype)
        for index, shape in enumerate(SHAPES):
            stream.store(index, torch.randn(shape, generator=generator).to(dtype))
    return store


def contents(store: ActivationStore) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for stream in store.streams.values() for name, tensor in stream.tensors().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_streams_hold_what_streams_in_memory_hold(tmp_path, dtype):
    memory = filled(tmp_path / "memory", budget=10**6, dtype=dtype)
    mapped = filled(tmp_path / "mapped", budget=0, dtype=dtype)
    assert same(contents(memory), contents(mapped))


def test_the_budget_decides_what_is_mapped(tmp_path):
    filled(tmp_path, budget=NBYTES)
    assert [file.name for file in (tmp_path / "mapped").iterdir()] == ["eval.pretrain.bin"]
    assert (tmp_path / "mapped" / "eval.pretrain.bin").stat().st_size == NBYTES


def test_without_a_budget_small_streams_stay_in_memory(tmp_path):
    filled(tmp_path, budget=None)
    assert not (tmp_path / "mapped").exists()


def test_a_batch_is_overwritten_in_place(tmp_path):
    stream = filled(tmp_path, budget=0).streams["calib.original"]
    other = stream.load(0, CPU).clone()
    stream.store(1, torch.full(SHAPES[1], 3.0))
    assert len(stream) == 2
    assert torch.equal(stream.load(1, CPU), torch.full(SHAPES[1], 3.0))
    assert torch.equal(stream.load(0, CPU), other)


@pytest.mark.parametrize("saved", [0, 10**6])
@pytest.mark.parametrize("restored", [0, 10**6])
def test_restores_exactly_what_was_saved(tmp_path, saved, restored):
    store = filled(tmp_path, saved)
    before = contents(store)
    store.save("a.safetensors")
    other = filled(tmp_path, restored, seed=1)
    assert not same(contents(other), before)
    other.restore("a.safetensors")
    assert same(contents(other), before)


def test_a_checkpoint_does_not_change_when_the_stream_does(tmp_path):
    store = filled(tmp_path, budget=0)
    before = contents(store)
    store.save("a.safetensors")
    store.streams["calib.original"].store(0, torch.zeros(SHAPES[0]))
    store.restore("a.safetensors")
    assert same(contents(store), before)


def test_mapped_files_of_an_earlier_run_are_removed_at_the_start(tmp_path):
    filled(tmp_path, budget=0)
    ActivationStore(tmp_path, 0)
    assert not (tmp_path / "mapped").exists()


def test_a_finished_run_leaves_no_mapped_files(tmp_path):
    store = filled(tmp_path, budget=0)
    store.save("a.safetensors")
    store.drop_mapped()
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    store.remove("a.safetensors")
    store.remove("a.safetensors")
    assert list(tmp_path.iterdir()) == []
