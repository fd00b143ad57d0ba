"""A quantized KV cache in the pass over the blocks, against Transformers' own decoding with such a cache, in float64.

In float64 nothing lies on the brink between two codes, so that both ways round alike and must agree to many digits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine import FP8, KIVI, Pass, passes, quick
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from llmc.export.dense import FakeQuant
from llmc.quant import Fp8Grid, IntGrid, KvSpec, PerGroup, PerTensor, PerToken
from llmc.quant.kv import on_grid

__all__ = ["passes", "quick"]  # fixtures
STATES = ("pretrain", "fake_quant", "fake_quant_wo_kv")


class OracleCache(DynamicCache):
    """Keeps all keys and values as they come, and gives out what the cache of a spec holds at this moment."""

    def __init__(self, spec: KvSpec) -> None:
        super().__init__()
        self.spec = spec

    def update(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        keys, values = (states.clone() for states in super().update(*args, **options))
        group, grid, before = self.spec.group, self.spec.grid, keys.shape[2] - 1
        whole, old = keys.shape[2], keys.shape[2]
        if self.spec.method == "Kivi":
            whole, old = before // self.spec.residual * self.spec.residual, max(0, before - self.spec.residual)
            for start in range(0, whole, group or self.spec.residual):
                span = slice(start, start + (group or self.spec.residual))
                keys[:, :, span] = on_grid(keys[:, :, span].mT, grid).mT
        else:
            self._by_token(keys, whole)
        self._by_token(values, old)
        return keys, values

    def _by_token(self, states: Tensor, count: int) -> None:
        for at in range(count):
            if isinstance(self.spec.granularity, PerTensor):
                states[:, :, at] = on_grid(states[:, :, at].flatten(1), self.spec.grid).view_as(states[:, :, at])
                continue
            for part in states[:, :, at].split(self.spec.group or states.shape[3], dim=-1):
                part.copy_(on_grid(part, self.spec.grid))


SPECS = [
    KIVI,
    KvSpec("Kivi", IntGrid(2, symmetric=True), PerToken(), residual=5),
    KvSpec("Naive", IntGrid(2, symmetric=False), PerToken()),
    KvSpec("Naive", IntGrid(2, symmetric=False, offset=True), PerTensor()),
    KvSpec("Naive", Fp8Grid(torch.float8_e5m2), PerGroup(8)),
]


@torch.no_grad()
def decoded(model: nn.Module, windows: list[Tensor], spec: KvSpec | None) -> Tensor:
    """Losses of the whole model, a token at a time."""
    losses = []
    for ids in windows:
        cache = DynamicCache() if spec is None else OracleCache(spec)
        steps = [model(input_ids=ids[:, [t]], past_key_values=cache).logits for t in range(ids.shape[1])]
        logits = torch.cat(steps, dim=1)[:, :-1].float()
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses)


def loss(losses: list[Tensor]) -> Tensor:
    return torch.cat([batch.flatten() for batch in losses])


def written(one: Pass) -> nn.Module:
    one.written_model(FakeQuant)  # makes the folder loadable
    return AutoModelForCausalLM.from_pretrained(one.folder / FakeQuant.folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("spec", SPECS, ids=KvSpec.describe)
def test_both_ways_measure_what_transformers_does_with_such_a_cache(llama, passes, spec):
    check(passes(llama, kv=spec, formats=(FakeQuant,), positions=STATES, decoded=STATES, dtype=torch.float64))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "opt", "opt-post-norm"])
def test_both_ways_in_every_family(checkpoint, passes, family):
    tiny = checkpoint(family)
    check(passes(tiny, kv=KIVI, formats=(FakeQuant,), positions=STATES, decoded=STATES, dtype=torch.float64))


def check(one: Pass) -> None:
    outcome = one.run()
    model = written(one)
    expected = {
        "pretrain": decoded(one.tiny.model().double(), one.evaluation, None),
        "fake_quant": decoded(model, one.evaluation, one.kv),
        "fake_quant_wo_kv": decoded(model, one.evaluation, None),
    }
    for state in STATES:
        assert (loss(outcome.decoded[state]) - expected[state]).abs().max() < 1e-5, state
        assert (loss(outcome.losses[state]) - expected[state]).abs().max() < 1e-5, state
    assert (expected["fake_quant"] - expected["fake_quant_wo_kv"]).abs().max() > 0.02


def test_a_static_cache_is_decoded_as_it_is_prefilled(llama, passes):
    one = passes(llama, kv=FP8, method="GPTQ", positions=STATES, decoded=STATES, dtype=torch.float64)
    outcome = one.run()
    for state in STATES:
        assert (loss(outcome.decoded[state]) - loss(outcome.losses[state])).abs().max() < 1e-5
    ranges = [row["cache_ranges"] for row in one.witness.rows]
    assert all(lo < 0 < hi for found in ranges for lo, hi in found.values())
    assert len({tuple(found["key"]) for found in ranges}) == 4
