"""Which tokens the error of a compressed Linear comes from, and that it is theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmc.algorithms import Statistics
from llmc.algorithms.gptq import GPTQ, GPTQOptions
from llmc.quant import PerGroup, QuantSpec
from llmc.stream.layer_numbers import ReadInputs, layer_numbers


class Hopeless:
    """A Gram matrix that no damping makes regular."""

    matrix, tokens = -torch.eye(16), 1


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 16, generator=generator) for rows in (8, 50, 7)]


def error(weight: Tensor, changed: Tensor, inputs: Tensor) -> float:
    exact = inputs.double() @ weight.double().T
    return float((inputs.double() @ changed.double().T - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize(
    ("solved", "seen", "source"),
    [(True, True, "calibration"), (False, True, "sample"), (True, False, "calibration"), (False, False, "weights")],
)
def test_the_error_is_of_calibration_the_sample_or_the_weights(make_view, drawn, solved, seen, source):
    weight, calibration, sample = drawn
    linear = nn.Linear(16, 8, bias=False)
    linear.weight = nn.Parameter(weight)
    view = make_view({"fc": linear}, [calibration], QuantSpec(3, True, PerGroup(8)))
    if not solved:
        view.stats = Statistics(gram=Hopeless())
    GPTQ(GPTQOptions()).subset(view)
    assert (view.notes["fc"].fallback is None) == solved
    pieces = [sample[:4], sample[4:]] if seen else []
    found = layer_numbers("fc", view, ReadInputs(pieces, pieces))
    changed = view.quantized["fc"].dequantize()
    inputs = {"calibration": calibration, "sample": sample, "weights": torch.eye(16)}[source]
    assert found["error_of"] == source
    assert found["error"] == pytest.approx(error(weight, changed, inputs), rel=1e-4)
    assert found["sample_tokens"] == (7 if seen else 0)
