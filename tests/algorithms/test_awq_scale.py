"""AWQ's choice of a scale, against trying every candidate on every token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmc.algorithms.awq import Awq, AwqOptions, candidates
from llmc.models import Heads, Subset
from llmc.quant import PerChannel, PerGroup, QuantSpec

COLUMNS = 32
SPECS = [QuantSpec(3, False, PerGroup(8)), QuantSpec(3, True, PerChannel())]
GATED = Subset(("gate", "up"), "norm", "mlp")
ALONE = Subset(("down",), "up", "down")


class Gated(nn.Module):
    """A feed-forward without its last Linear: two Linears read one input, and neither is the output."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.gate = nn.Linear(COLUMNS, 24, bias=False)
            self.up = nn.Linear(COLUMNS, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)


class Calls:
    """The module's calls on the batches, as the engine would repeat them. Notes which were asked for."""

    def __init__(self, module: nn.Module, batches: list[Tensor]) -> None:
        self.module, self.batches, self.asked = module, batches, []

    def __len__(self) -> int:
        return len(self.batches)

    def output(self, batch: int) -> Tensor:
        self.asked.append(batch)
        with torch.no_grad():
            return self.module(self.batches[batch])


def all_scales(magnitude: Tensor, weights: list[Tensor], spec: QuantSpec, version: str) -> list[Tensor]:
    """The paper's candidates, by index; the identity first."""
    found = [torch.ones_like(magnitude)]
    relative = []
    for weight in weights:
        size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else COLUMNS
        groups = weight.abs().unflatten(1, (-1, size))
        relative.append((groups / groups.amax(-1, keepdim=True)).flatten(1))
    for i in range(20):
        scale = magnitude ** (i / 20)
        if version == "v1":
            scale = scale / torch.cat(relative).mean(0) ** (1 - i / 20)
        found.append(scale / (scale.max() * scale.min()) ** 0.5)
    return found


def brute_force(
    module: nn.Module, weights: dict[str, nn.Parameter], batches: list[Tensor], scales: list[Tensor], rounded: Callable
) -> list[float]:
    """Squared error of the module's output for each scale, summed over the batches."""
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    losses = []
    with torch.no_grad():
        expected = [module(batch) for batch in batches]
        for scale in scales:
            for name, weight in weights.items():
                weight.copy_(rounded(originals[name] * scale) / scale)
            pairs = zip(batches, expected, strict=True)
            losses.append(sum((module(batch) - output).double().square().sum().item() for batch, output in pairs))
        for name, weight in weights.items():
            weight.copy_(originals[name])
    return losses


@pytest.fixture
def search(make_view, nearest) -> Callable:
    """Run AWQ on a gated module; give its scale (ones: none was folded), the candidates and their losses."""

    def run(
        batches: list[Tensor],
        spec: QuantSpec,
        seed: int = 0,
        how: str = "full",
        version: str = "v2",
        seen: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor], list[float]]:
        module, seen = Gated(seed), seen or batches
        linears = {"gate": module.gate, "up": module.up}
        weights = {name: linear.weight for name, linear in linears.items()}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        prev, calls = nn.RMSNorm(COLUMNS), Calls(module, batches)
        view = make_view(linears, seen, spec, subset=GATED, prev=prev, calls=calls)
        Awq(AwqOptions(search=how, trans_version=version, weight_clip=False)).subset(view)
        assert all(torch.equal(weight, kept[name]) for name, weight in weights.items())
        scales = all_scales(torch.cat(seen).abs().mean(0), list(kept.values()), spec, version)
        losses = brute_force(module, weights, batches, scales, lambda weight: nearest(weight, spec))
        return (torch.ones(COLUMNS) if view.scale is None else view.scale[0]), scales, losses

    return run


def best(losses: list[float]) -> int:
    return losses.index(min(losses))


def index_of(chosen: Tensor, scales: list[Tensor]) -> int:
    return next(i for i, scale in enumerate(scales) if torch.allclose(chosen, scale, rtol=1e-4))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("seed", range(3))
def test_a_full_search_chooses_as_brute_force_does(tokens, search, spec, version, seed):
    batches = list(tokens(4 * 40, COLUMNS, seed).split(40))
    chosen, scales, losses = search(batches, spec, seed, "full", version)
    torch.testing.assert_close(chosen, scales[best(losses)])
    assert best(losses) > 0  # scaling pays here: the case is not trivial


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("seed", range(3))
def test_a_race_chooses_as_well_as_a_full_search(tokens, search, spec, version, seed):
    batches = list(tokens(16 * 256, COLUMNS, seed).split(256))
    chosen, scales, losses = search(batches, spec, seed, "race", version)
    assert losses[index_of(chosen, scales)] <= 1.05 * min(losses)


def test_every_batch_counts(tokens, search):
    """Channel 3 is loud in the short first batch only, channel 20 in the long second one."""
    first, second = tokens(4, COLUMNS, 1) / 4, tokens(200, COLUMNS, 2)
    first[:, 3] *= 60
    second[:, 20] *= 20
    chosen, scales, losses = search([first, second], SPECS[0])
    _, _, of_first = search([first], SPECS[0], seen=[first, second])
    assert best(of_first) != best(losses)
    torch.testing.assert_close(chosen, scales[best(losses)])


@pytest.mark.parametrize("how", ["full", "race"])
@pytest.mark.parametrize("seed", range(3))
def test_the_identity_never_loses_to_something_worse(search, how, seed):
    """The first batch, all that the race's first round sees, likes every scale; on the others every scale hurts."""
    noise = torch.randn(16, 8, COLUMNS, generator=torch.Generator().manual_seed(seed))
    rising = torch.logspace(-1, 1, COLUMNS)
    first, others = noise[0] * rising, noise[1:] / rising * 100
    chosen, _, losses = search([first, *others], SPECS[1], seed, how, seen=[first])
    assert best(losses) == 0
    assert torch.equal(chosen, torch.ones(COLUMNS))


def test_a_race_measures_few_candidates_on_all_tokens(make_view, tokens):
    module, batches = Gated(0), list(tokens(64 * 64, COLUMNS).split(64))
    asked = {}
    for how in ("full", "race"):
        calls = Calls(module, batches)
        linears = {"gate": module.gate, "up": module.up}
        view = make_view(linears, batches, SPECS[0], subset=GATED, prev=nn.RMSNorm(COLUMNS), calls=calls)
        Awq(AwqOptions(search=how, weight_clip=False)).subset(view)
        asked[how] = len(calls.asked)
    every = 64 * (20 + 1)
    assert asked["full"] <= every  # who is behind a finished candidate stops
    assert asked["race"] < every / 3


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_linear_that_is_its_own_witness_needs_no_calls(make_view, tokens, nearest, spec, version):
    batches = list(tokens(160, COLUMNS).split(40))
    linear = nn.Linear(COLUMNS, 24, bias=True)
    view = make_view({"down": linear}, batches, spec, subset=ALONE, prev=nn.Linear(8, COLUMNS))
    scales = all_scales(torch.cat(batches).abs().mean(0), [linear.weight.detach()], spec, version)
    Awq(AwqOptions(trans_version=version, weight_clip=False)).subset(view)
    losses = brute_force(linear, {"down": linear.weight}, batches, scales, lambda weight: nearest(weight, spec))
    torch.testing.assert_close(view.scale[0], scales[best(losses)])


def test_candidates_are_positive_and_finite_also_for_silent_channels(make_view, tokens):
    inputs = tokens(50, COLUMNS)
    inputs[:, :5] = 0
    linear = nn.Linear(COLUMNS, 8)
    linear.weight.data[:, 7] = 0
    for version in ("v1", "v2"):
        options = AwqOptions(trans_version=version)
        view = make_view({"down": linear}, [inputs], SPECS[0], subset=ALONE, prev=nn.Linear(8, COLUMNS))
        found = torch.stack(candidates(view, view.stats.abs_mean.mean, view.scale_rule(allow_gqa=False), options))
        assert torch.equal(found[0], torch.ones(COLUMNS))
        assert (found.isfinite() & (found > 0)).all()


def test_query_heads_of_one_value_head_share_their_scale(make_view, tokens, nearest):
    heads, spec = Heads(query=8, kv=2, dim=4), SPECS[0]
    inputs, linear = tokens(200, COLUMNS), Gated(seed=0).gate
    subset = Subset(("o",), "v", "o", reads="heads")
    prev = nn.Linear(16, heads.kv * heads.dim)
    view = make_view({"o": linear}, [inputs], spec, subset=subset, prev=prev, heads=heads)
    Awq(AwqOptions(do_gqa_trans=True, weight_clip=False)).subset(view)
    scale, rule = view.scale
    by_head = scale.reshape(heads.kv, 4, heads.dim)
    assert torch.equal(by_head, by_head[:, :1].expand_as(by_head))
    assert torch.equal(rule.to_prev(scale), by_head[:, 0].reshape(-1))

    tied = []
    for untied in all_scales(inputs.abs().mean(0), [linear.weight.detach()], spec, "v2"):
        mean = untied.reshape(heads.kv, 4, heads.dim).prod(1, keepdim=True) ** 0.25
        tied.append(mean.expand(-1, 4, -1).reshape(-1))
    losses = brute_force(linear, {"o": linear.weight}, [inputs], tied, lambda weight: nearest(weight, spec))
    torch.testing.assert_close(scale, tied[best(losses)])


@pytest.mark.parametrize(
    ("options", "prev_rows"),
    [(AwqOptions(weight_clip=False), 8), (AwqOptions(do_gqa_trans=True, weight_clip=False), 12)],
)
def test_where_nothing_can_absorb_a_scale_none_is_chosen(make_view, tokens, options, prev_rows):
    heads, subset = Heads(query=8, kv=2, dim=4), Subset(("o",), "v", "o", reads="heads")
    view = make_view(
        {"o": nn.Linear(COLUMNS, 16)},
        [tokens(50, COLUMNS)],
        SPECS[0],
        subset=subset,
        prev=nn.Linear(16, prev_rows),
        heads=heads,
    )
    Awq(options).subset(view)
    assert view.scale is None


def test_a_subset_without_grids_is_left_alone(make_view, tokens):
    view = make_view(
        {"down": nn.Linear(COLUMNS, 8)}, [tokens(50, COLUMNS)], {}, subset=ALONE, prev=nn.Linear(8, COLUMNS)
    )
    Awq(AwqOptions()).subset(view)
    assert view.scale is None
    assert not view.clips
