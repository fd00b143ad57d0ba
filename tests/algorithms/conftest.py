"""What the methods' tests share: structured tokens, a rounding written down once more, views without an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from llmc.algorithms import Statistics, SubsetView, new_statistics
from llmc.models import Heads, Subset
from llmc.quant import PerGroup, QuantSpec

Round = Callable[..., Tensor]
STATISTICS = {"gram", "abs_mean", "abs_max", "channel_range", "sequence_range", "sum_squares"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These matrices are small: threads would only wait for one another. Random weights are those of one seed."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Calibration tokens ``[count, columns]``: correlated channels, some ten times larger than others."""

    def make(count: int, columns: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
        size = torch.exp(torch.randn(columns, generator=generator))
        return torch.randn(count, columns, generator=generator) @ (mixing + torch.eye(columns)) * size

    return make


@pytest.fixture
def nearest() -> Round:
    """Round-to-nearest of ``[out, in]`` in float32, by the definition of the grid; ``lo``, ``hi`` shrink the range."""

    def fake_quantize(weight: Tensor, spec: QuantSpec, lo: Tensor | float = 1.0, hi: Tensor | float = 1.0) -> Tensor:
        size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else weight.shape[1]
        groups = weight.float().unflatten(1, (-1, size))
        low, high = groups.amin(-1).clamp(max=0) * lo, groups.amax(-1).clamp(min=0) * hi
        half = 2 ** (spec.bits - 1)
        if spec.symmetric:
            scale, zero = torch.maximum(-low, high) / (half - 1), torch.zeros_like(low)
        else:
            scale = (high - low) / (2 * half - 1)
            zero = -half - (low / scale).round()
        codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(-half, half - 1)
        return ((codes - zero[..., None]) * scale[..., None]).reshape(weight.shape)

    return fake_quantize


@pytest.fixture
def make_view() -> Callable[..., SubsetView]:
    """A view of Linears that read ``inputs``, as the engine would build it."""

    def make(
        linears: Mapping[str, nn.Linear],
        inputs: list[Tensor],
        specs: QuantSpec | Mapping[str, QuantSpec],
        *,
        subset: Subset | None = None,
        prev: nn.Module | None = None,
        heads: Heads | None = None,
        calls: object = None,
    ) -> SubsetView:
        columns = inputs[0].shape[-1]
        statistics: Statistics = new_statistics(STATISTICS, columns, torch.device("cpu"))
        for batch in inputs:
            statistics.update(batch)
        return SubsetView(
            subset=subset or Subset(tuple(linears), None, ""),
            linears=linears,
            specs=dict.fromkeys(linears, specs) if isinstance(specs, QuantSpec) else specs,
            prev=prev,
            heads=heads or Heads(1, 1, columns),
            stats=statistics,
            calls=calls,
            clips={},
        )

    return make
