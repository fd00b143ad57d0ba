"""SmoothQuant and OS+ against their equations, written down once more, and against trying every candidate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmc.algorithms import search
from llmc.algorithms.osplus import OsPlus, OsPlusOptions, candidates
from llmc.algorithms.smoothquant import SmoothQuant, SmoothQuantOptions
from llmc.models import Subset
from llmc.quant import ActSpec, PerChannel, PerToken, QuantSpec, fake_quantize_inputs, fake_quantize_weight

COLUMNS = 32
W8 = QuantSpec(8, True, PerChannel())
A6 = ActSpec(QuantSpec(6, True, PerToken()))
GATED = Subset(("gate", "up"), "norm", "mlp")


class Gated(nn.Module):
    """A feed-forward without its last Linear: two Linears read one input, and neither is the output."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.gate = nn.Linear(COLUMNS, 24, bias=bias)
            self.up = nn.Linear(COLUMNS, 24, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {"gate": self.gate, "up": self.up}


class Calls:
    """The module's calls on the batches, as the engine would repeat them."""

    def __init__(self, module: nn.Module, batches: list[Tensor]) -> None:
        self.module, self.batches = module, batches

    def __len__(self) -> int:
        return len(self.batches)

    def output(self, batch: int) -> Tensor:
        with torch.no_grad():
            return self.module(self.batches[batch])


@pytest.fixture
def batches(tokens) -> list[Tensor]:
    """Inputs of which two channels are fifty times larger than the others, and off their middle."""
    made = [tokens(24, COLUMNS, seed) for seed in range(4)]
    for batch in made:
        batch[:, [3, 17]] = batch[:, [3, 17]] * 50 + 100
    return made


@pytest.fixture
def view_of(make_view, batches):
    def make(module: Gated, prev: nn.Module, act: ActSpec | None = A6):
        view = make_view(module.linears, batches, W8, subset=GATED, prev=prev, calls=Calls(module, batches))
        view.act = act
        return view

    return make


def after_folding(module: Gated, batch: Tensor, scale: Tensor, shift: Tensor | None, act: ActSpec | None) -> Tensor:
    """The module's output with shifted, scaled and rounded input and rounded weights, without any hook."""
    inputs = batch if shift is None else batch - shift
    inputs = inputs / scale
    inputs = inputs if act is None else fake_quantize_inputs(inputs, act)
    outputs = {}
    for name, linear in module.linears.items():
        outputs[name] = inputs @ fake_quantize_weight(linear.weight * scale, W8).T
        if linear.bias is not None:
            outputs[name] = outputs[name] + linear.bias
        if shift is not None:
            outputs[name] = outputs[name] + linear.weight @ shift
    return nn.functional.silu(outputs["gate"]) * outputs["up"]


def best(module: Gated, batches: list[Tensor], scales: list[Tensor], shift: Tensor | None = None) -> int:
    with torch.no_grad():
        losses = [
            sum(
                float((after_folding(module, batch, scale, shift, A6) - module(batch)).double().square().sum())
                for batch in batches
            )
            for scale in scales
        ]
    return losses.index(min(losses))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85])
def test_the_scale_is_that_of_the_papers_equation(view_of, batches, alpha):
    module = Gated(bias=False)
    view = view_of(module, nn.RMSNorm(COLUMNS))
    SmoothQuant(SmoothQuantOptions(alpha=alpha)).subset(view)
    x = torch.cat(batches).abs().amax(0)
    w = torch.cat([module.gate.weight, module.up.weight]).abs().amax(0)
    torch.testing.assert_close(view.scale[0], (x**alpha / w ** (1 - alpha)).detach())


def test_alpha_by_linear(view_of):
    chosen = []
    for alpha in ({"gate": 0.9}, 0.9, {"q_proj": 0.9}, 0.5):
        view = view_of(Gated(bias=False), nn.RMSNorm(COLUMNS))
        SmoothQuant(SmoothQuantOptions(alpha=alpha)).subset(view)
        chosen.append(view.scale[0])
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[2], chosen[3])
    assert not torch.equal(chosen[0], chosen[2])


def test_automatic_alpha_is_the_best_of_all(view_of, batches):
    module = Gated(bias=False)
    view = view_of(module, nn.RMSNorm(COLUMNS))
    SmoothQuant(SmoothQuantOptions(alpha="auto")).subset(view)
    x = torch.cat(batches).abs().amax(0)
    w = torch.cat([module.gate.weight, module.up.weight]).abs().amax(0)
    scales = [torch.ones(COLUMNS), *((x ** (i / 20) / w ** (1 - i / 20)).detach() for i in range(2, 20))]
    expected = best(module, batches, scales)
    assert expected > 0, "with such outliers smoothing must pay"
    torch.testing.assert_close(view.scale[0], scales[expected])


def test_a_channel_that_is_always_zero_keeps_its_scale(make_view, batches):
    module = Gated(bias=False)
    for batch in batches:
        batch[:, 5] = 0
    view = make_view(module.linears, batches, W8, subset=GATED, prev=nn.RMSNorm(COLUMNS))
    SmoothQuant(SmoothQuantOptions()).subset(view)
    assert view.scale[0][5] == 1 and view.scale[0].isfinite().all()


@pytest.mark.parametrize("method", [SmoothQuant(SmoothQuantOptions()), OsPlus(OsPlusOptions())])
def test_what_no_norm_feeds_is_left_alone(make_view, batches, method):
    module = Gated(bias=False)
    for prev in (None, nn.Linear(4, COLUMNS)):
        view = make_view(module.linears, batches, W8, subset=GATED, prev=prev, calls=Calls(module, batches))
        method.subset(view)
        assert view.scale is None and view.shift is None


@pytest.mark.parametrize("how", ["full", "coarse"])
@pytest.mark.parametrize(("bias", "shifted"), [(True, None), (True, False), (False, None)])
def test_osplus_takes_the_best_threshold(view_of, batches, bias, shifted, how):
    """Of all, or of every tenth and then of those up to the next ones."""
    module, prev = Gated(bias=bias), nn.LayerNorm(COLUMNS) if bias else nn.RMSNorm(COLUMNS)
    view = view_of(module, prev)
    OsPlus(OsPlusOptions(shift=shifted, search=how)).subset(view)
    x = torch.cat(batches)
    shift = (x.amax(0) + x.amin(0)) / 2 if bias and shifted is None else None
    assert (view.shift is None) == (shift is None)
    x = x if shift is None else x - shift
    top = float(x.abs().max())
    assert top > 50, "here thresholds are spaced by their ratio"
    thresholds = top ** (1 - torch.arange(1, 101) / 100)
    scales = [torch.ones(COLUMNS)]
    for threshold in thresholds:
        by_channel = [
            max(1.0, float(hi / threshold), float(-lo / threshold)) for hi, lo in zip(x.amax(0), x.amin(0), strict=True)
        ]
        scales.append(torch.tensor(by_channel))
    chosen = range(101)
    if how == "coarse":
        tenths = [0, *range(10, 101, 10)]
        middle = tenths[best(module, batches, [scales[index] for index in tenths], shift)]
        chosen = [0, *range(max(middle - 9, 1), min(middle + 9, 100) + 1)]
    expected = chosen[best(module, batches, [scales[index] for index in chosen], shift)]
    assert expected > 0
    torch.testing.assert_close(view.scale[0], scales[expected])
    if shift is not None:
        torch.testing.assert_close(view.shift, shift)


@pytest.mark.parametrize("found", [0, 1, 9, 10, 11, 47, 95, 99, 100])
def test_a_coarse_search_finds_a_minimum_wherever_it_is(monkeypatch, found):
    """The errors here are those of a valley with its floor at ``found``, and an identity that is bad but there."""
    asked: list[int] = []

    def nearest(view, scales, *, full, shift=None):
        indices = [int(scale) for scale in scales]
        assert indices[0] == 0 and indices == sorted(set(indices))
        asked.extend(indices)
        errors = [abs(index - found) if index or not found else 1000 for index in indices]
        return errors.index(min(errors))

    monkeypatch.setattr(search, "best_scale", nearest)
    assert search.best_in_order(None, [torch.tensor(float(index)) for index in range(101)]) == found
    assert len(asked) <= 11 + 20


def test_osplus_only_shrinks_what_sticks_out():
    hi, lo = torch.tensor([1.0, 8.0, 2.0]), torch.tensor([-1.0, 0.0, -6.0])
    found = candidates(lo, hi)
    assert len(found) == 1 + 100 and torch.equal(found[0], torch.ones(3))
    torch.testing.assert_close(found[-1], torch.tensor([1.0, 8.0, 6.0]))
    assert all((scale >= 1).all() and scale[0] == 1 for scale in found)
    thresholds = [8 / float(scale[1]) for scale in found[1:]]
    assert thresholds == pytest.approx([8 - 0.07 * step for step in range(1, 101)]), "evenly spaced, as published"
    assert candidates(lo / 10, hi / 10)[1:] == []
