"""OmniQuant on a small block: where it starts, what it reaches, and which schemes it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmc.algorithms import BlockView, ClipRatios, Ignored, make_recipe, options_types
from llmc.algorithms.omniquant import OmniQuant, OmniQuantOptions
from llmc.config import load_config
from llmc.errors import ConfigError
from llmc.models import Subset
from llmc.quant import ActSpec, Mse, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, StaticMinMax

W3 = QuantSpec(3, False, PerChannel())
COLUMNS = 16
UNMOVED = 1e-12  # a learning rate


class Feed(nn.Module):
    """A norm, then two Linears that read it, gated."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(COLUMNS) if bias else nn.RMSNorm(COLUMNS)
        self.gate, self.up = nn.Linear(COLUMNS, 24, bias=bias), nn.Linear(COLUMNS, 24, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return nn.functional.silu(self.gate(x)) * self.up(x)


class Calls:
    """A ``BlockCalls`` without an engine."""

    def __init__(self, module: nn.Module, batches: list[Tensor]) -> None:
        self.module, self.batches = module, batches
        self.targets = [module(batch).detach() for batch in batches]

    def __len__(self) -> int:
        return len(self.batches)

    def output(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        return functional_call(self.module, dict(weights), (self.batches[batch],))

    def plain(self, batch: int) -> Tensor:
        return self.module(self.batches[batch])

    def target(self, batch: int) -> Tensor:
        return self.targets[batch]


@pytest.fixture
def block_view(make_view, tokens) -> Callable[..., BlockView]:
    """A view of a ``Feed`` whose inputs have outliers."""

    def make(spec: QuantSpec = W3, *, bias: bool = False, transformed: bool = False) -> BlockView:
        torch.manual_seed(0)
        module, batches = Feed(bias=bias), [tokens(20, COLUMNS, seed) for seed in range(3)]
        with torch.no_grad():
            module.norm.weight[[2, 9]] = 5.0
            if bias:
                module.norm.bias[4] = 20.0
            read = [module.norm(batch) for batch in batches]
            subset = Subset(("gate", "up"), "norm", "")
            linears = {"gate": module.gate, "up": module.up}
            view = make_view(linears, read, spec, subset=subset, prev=module.norm)
            weights = {name: parameter.data for name, parameter in module.named_parameters()}
            return BlockView([view], weights, Calls(module, batches), transformed)

    return make


def rounded(view: BlockView, nearest: Callable[..., Tensor]) -> float:
    """The block's mean loss with its present clips, by the grid's definition, without any of OmniQuant's code."""
    subset, losses = view.subsets[0], []
    weights = dict(view.weights)
    for name, spec in subset.specs.items():
        clip = subset.clips[name]
        weights[f"{name}.weight"] = nearest(weights[f"{name}.weight"], spec, clip.lo, clip.hi)
    for batch in range(len(view.calls)):
        change = view.calls.output(batch, weights).detach() - view.calls.target(batch)
        losses.append(float(change.double().square().mean()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("spec", [W3, QuantSpec(3, True, PerGroup(8)), QuantSpec(2, False, PerGroup(4))])
def test_the_loss_is_that_of_the_clips_it_leaves_and_lower_than_at_the_start(block_view, nearest, spec):
    view = block_view(spec)
    note = OmniQuant(OmniQuantOptions(epochs=30, lwc_lr=0.05)).tune(view)
    assert note.end == pytest.approx(rounded(view, nearest), rel=1e-4)
    assert note.end < 0.8 * note.start and note.epoch > 0
    for clip in view.subsets[0].clips.values():
        clip.lo.fill_(torch.tensor(4.0).sigmoid())
        clip.hi.fill_(torch.tensor(4.0).sigmoid())
    assert note.start == pytest.approx(rounded(view, nearest), rel=1e-4)


def test_rows_come_close_to_the_best_of_all_clips(make_view):
    """Both ends of each row's range by brute force: the loss of a Linear is a sum over its rows."""
    columns, spec = 128, QuantSpec(2, False, PerChannel())
    module, batches = nn.Sequential(nn.Linear(columns, 12, bias=False)), [torch.randn(256, columns)]
    with torch.no_grad():
        module[0].weight[:, 5], module[0].weight[:, 20] = 0.3, -0.3
        weight = module[0].weight.data.double()

        def loss(lo: Tensor, hi: Tensor) -> Tensor:
            """Of each row."""
            low, high = weight.amin(1, keepdim=True) * lo, weight.amax(1, keepdim=True) * hi
            scale = (high - low) / 3
            zero = -2 - (low / scale).round()
            codes = ((weight / scale).round() + zero).clamp(-2, 1)
            return (((codes - zero) * scale - weight) @ batches[0].double().T).square().mean(1)

        steps = torch.linspace(0.1, 1, 46, dtype=torch.float64)
        tried = [loss(lo, hi) for lo, hi in itertools.product(steps, steps)]
        best = float(torch.stack(tried).amin(0).mean())
    view = make_view({"0": module[0]}, batches, spec)
    view = BlockView([view], {"0.weight": module[0].weight.data}, Calls(module, batches), transformed=False)
    note = OmniQuant(OmniQuantOptions(epochs=80, lwc_lr=0.1)).tune(view)
    clip = view.subsets[0].clips["0"]
    assert note.end == pytest.approx(float(loss(clip.lo, clip.hi).mean()), rel=1e-3)
    assert note.end - best < 0.1 * (note.start - best)


def test_it_starts_from_the_clips_of_an_earlier_step(block_view, nearest):
    view = block_view()
    shape = W3.scale_shape(24, COLUMNS)
    given = ClipRatios(torch.full(shape, 0.7), torch.full(shape, 1.0))
    view.subsets[0].clips["gate"] = given
    note = OmniQuant(OmniQuantOptions(epochs=1, lwc_lr=UNMOVED)).tune(view)
    left = view.subsets[0].clips
    torch.testing.assert_close(left["gate"].lo, given.lo)
    torch.testing.assert_close(left["gate"].hi, torch.full(shape, 0.9999))
    torch.testing.assert_close(left["up"].lo, torch.full(shape, 4.0).sigmoid())
    assert note.start == pytest.approx(rounded(view, nearest), rel=1e-4)


def test_what_isnt_learned_stays_exactly(block_view):
    view = block_view()
    given = ClipRatios(*torch.rand(2, *W3.scale_shape(24, COLUMNS)).clamp(min=0.3))
    view.subsets[0].clips["gate"] = given
    OmniQuant(OmniQuantOptions(lwc=False, let=True, epochs=2)).tune(view)
    torch.testing.assert_close(view.subsets[0].clips["gate"].lo, given.lo)
    assert torch.equal(view.subsets[0].clips["up"].hi, torch.ones_like(given.hi))
    assert view.subsets[0].scale is not None


@pytest.mark.parametrize("alpha", [0.5, 0.75])
def test_scales_start_from_smoothquants_formula_and_shifts_from_the_middle(block_view, alpha):
    view = block_view(bias=True)
    options = OmniQuantOptions(let=True, alpha=alpha, use_shift=True, let_lr=UNMOVED, lwc_lr=UNMOVED, epochs=1)
    OmniQuant(options).tune(view)
    read = torch.cat([view.calls.module.norm(batch).detach() for batch in view.calls.batches])
    middle = (read.amax(0) + read.amin(0)) / 2
    largest = torch.cat([view.weights["gate.weight"], view.weights["up.weight"]]).abs().amax(0)
    expected = ((read - middle).abs().amax(0) ** alpha / largest ** (1 - alpha)).clamp(min=1e-2)
    torch.testing.assert_close(view.subsets[0].shift, middle)
    torch.testing.assert_close(view.subsets[0].scale[0], expected)


def test_what_an_earlier_step_has_scaled_starts_as_it_is(block_view):
    view = block_view(transformed=True)
    OmniQuant(OmniQuantOptions(let=True, let_lr=UNMOVED, lwc_lr=UNMOVED, epochs=1)).tune(view)
    torch.testing.assert_close(view.subsets[0].scale[0], torch.ones(COLUMNS))


@pytest.mark.parametrize(
    ("act", "use_shift", "shifted"), [(True, None, True), (False, None, False), (True, False, False)]
)
def test_shifts_are_for_rounded_inputs_unless_the_file_says_otherwise(block_view, act, use_shift, shifted):
    view = block_view(bias=True)
    view.subsets[0].act = ActSpec(QuantSpec(8, True, PerToken())) if act else None
    OmniQuant(OmniQuantOptions(let=True, use_shift=use_shift, epochs=1)).tune(view)
    assert (view.subsets[0].shift is not None) == shifted and view.subsets[0].scale is not None


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_folded_leaves_the_float_block_as_it_was(block_view, bias):
    view = block_view(bias=bias)
    OmniQuant(OmniQuantOptions(let=True, use_shift=True, epochs=3)).tune(view)
    subset, module = view.subsets[0], view.calls.module
    assert (subset.shift is not None) == bias
    scale = subset.scale[0].double()
    shift = torch.zeros_like(scale) if subset.shift is None else subset.shift.double()
    assert not torch.allclose(scale, torch.ones_like(scale))
    inputs = (module.norm.double()(view.calls.batches[0].double()) - shift) / scale
    outputs = {}
    for name in ("gate", "up"):
        linear = getattr(module, name).double()
        offset = 0 if not bias else linear.bias + linear.weight @ shift
        outputs[name] = inputs @ (linear.weight * scale).T + offset
    found = nn.functional.silu(outputs["gate"]) * outputs["up"]
    torch.testing.assert_close(found, module(view.calls.batches[0].double()), rtol=1e-10, atol=1e-10)


def test_scales_are_learned_where_there_are_outliers(block_view):
    """From no smoothing at all to what SmoothQuant's formula would have given."""
    options = OmniQuantOptions(epochs=30, lwc=False, let=True)
    formula = OmniQuant(options.model_copy(update={"epochs": 1})).tune(block_view()).start
    note = OmniQuant(options).tune(block_view(transformed=True))
    assert note.end < formula < 0.3 * note.start


def test_the_augmented_loss_adds_the_distance_to_the_plain_block(block_view):
    losses = []
    for aug_loss in (False, True):
        view = block_view()
        losses.append(OmniQuant(OmniQuantOptions(aug_loss=aug_loss, epochs=1)).tune(view).start)
    assert losses[1] == pytest.approx(2 * losses[0]), "here both targets are the same"


def test_it_asks_for_both_models():
    needs = OmniQuant(OmniQuantOptions()).needs(quant_out=None)
    assert needs.data and needs.targets and needs.compressed_stream
    assert not OmniQuant(OmniQuantOptions()).needs(quant_out=False).compressed_stream


E4M3 = QuantSpec.floating("e4m3", PerChannel())
STATIC = ActSpec(QuantSpec(8, True, PerTensor()), StaticMinMax())


@pytest.mark.parametrize(
    ("spec", "act", "told"),
    [
        (E4M3, None, "quant.weight.bit: OmniQuant learns the ranges of integer grids, not of W8 e4m3 channel"),
        (replace(W3, ranges=Mse()), None, "quant.weight.calib_algo"),
        (W3, STATIC, "quant.act.static"),
    ],
)
def test_schemes_that_it_cant_do_are_refused(spec, act, told):
    with pytest.raises(ConfigError, match=told):
        make_recipe(["OmniQuant"], {}, spec, Ignored(), quant_out=None, act=act)


@pytest.mark.parametrize(
    ("special", "told"),
    [
        ({"lwc": False}, "lwc and let are both False"),
        ({"load_clip": True}, r"special.load_clip.*\[Awq, OmniQuant\]"),
        ({"search_clip_init": True}, r"special.search_clip_init.*\[Awq, OmniQuant\]"),
        ({"epochs": 0}, "special.epochs"),
        ({"lwc_lr": -1.0}, "special.lwc_lr"),
        ({"alpha": 1.5}, "special.alpha"),
        ({"let_rl": 0.1}, "did you mean 'let_lr'"),
        ({"use_shift": "yes please"}, "special.use_shift"),
    ],
)
def test_bad_options_are_refused_when_the_file_is_read(special, told):
    weight = {"bit": 4, "symmetric": False, "granularity": "per_channel"}
    content = {"model": {"path": "model"}, "quant": {"method": "OmniQuant", "weight": weight, "special": special}}
    with pytest.raises(ConfigError, match=told):
        load_config(content, methods=options_types())
