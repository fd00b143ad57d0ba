"""Discovery in modules of one's own: what is understood, what the numbers contradict, what is refused; its parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmc.architecture import check_linears
from llmc.errors import ModelError
from llmc.models import Discovery, Subset, discover
from llmc.models.discovery import exact


class Block(nn.Module):
    """Norm, two Linears that read it, one that reads their product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.one, self.two = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        read = self.norm(hidden)
        return hidden + self.out(torch.sigmoid(self.one(read)) * self.two(read))


class Model(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(block(8) for _ in range(3))
        self.head = nn.Linear(8, 20)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = self.embed(input_ids)
        for index, block in enumerate(self.blocks):
            hidden = self.step(index, block, hidden, input_ids)
        return self.head(hidden)

    def step(self, index: int, block: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
        return block(hidden)


def discovered(model: nn.Module, layers: int = 3, **values: Any) -> Discovery:
    text = SimpleNamespace(num_hidden_layers=layers, vocab_size=20, hidden_size=8, **values)
    return discover(model.to("meta").double().eval(), SimpleNamespace(get_text_config=lambda: text))


def test_a_model_of_ones_own_is_understood():
    found = discovered(Model())
    assert (found.path, found.head) == ("blocks", ("head",))
    assert found.blocks[0].subsets == (
        Subset(("one", "two"), "norm", "", "residual", "ffn"),
        Subset(("out",), "two", "out", "ffn", "residual"),
    )


class SecretReader(Block):
    """Another reader of the norm, which isn't a module with a weight ``[.., in]``."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.secret = nn.Parameter(torch.empty(width))

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        read = self.norm(hidden)
        return hidden + self.out(torch.sigmoid(self.one(read)) * self.two(read)) + (read * self.secret).tanh()


class TiedWeights(Block):
    """The product is read by a second module, too, by its weight."""

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        read = self.norm(hidden)
        product = torch.sigmoid(self.one(read)) * self.two(read)
        return hidden + self.out(product) + product[..., :8].square()


@pytest.mark.parametrize(("block", "number", "maker"), [(SecretReader, 0, "norm"), (TiedWeights, 1, "two")])
def test_a_claim_that_the_numbers_contradict_is_dropped(block, number, maker):
    facts = discovered(Model(block)).blocks[0]
    assert [s.prev for s in facts.subsets] == [None if i == number else p for i, p in enumerate(["norm", "two"])]
    assert facts.reasons == {facts.subsets[number].key: f"{maker} makes it, but something else depends on that, too"}


class Mixture(nn.Module):
    """All experts, weighed by a router that is a Linear, and by a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router, self.gate = nn.Linear(width, 3, bias=False), nn.Linear(width, 1, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, read: Tensor) -> Tensor:
        shares = self.router(read).softmax(-1).unbind(-1)
        mixed = sum(share[..., None] * expert(read) for share, expert in zip(shares, self.experts, strict=True))
        return mixed * self.gate(read).sigmoid()


class Mixed(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.second, self.narrow, self.mixture = nn.LayerNorm(width), nn.Linear(width, 3), Mixture(width)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        hidden = super().forward(hidden)
        read = self.second(hidden)
        return hidden + self.mixture(read) + self.narrow(read).sum(-1, keepdim=True).tanh()


def test_routers_and_gates_are_further_readers():
    """What is only as narrow as a router is compressed."""
    subset = discovered(Model(Mixed), num_experts=3).blocks[0].subsets[2]
    experts = tuple(f"mixture.experts.{index}" for index in range(3))
    assert subset.linears == (*experts, "narrow")
    assert (subset.also, subset.prev, subset.inspect) == (("mixture.router", "mixture.gate"), "second", "")


class InOneTensor(nn.Module):
    """Experts that nobody made Linears of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.empty(3, width, width))

    def forward(self, read: Tensor) -> Tensor:
        return (read[:, :, None, None] @ self.matrices).sum((2, 3)).tanh()


class Opaque(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.experts = InOneTensor(width)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        read = self.norm(hidden)
        return hidden + self.out(torch.sigmoid(self.one(read)) * self.two(read)) + self.experts(read)


def test_experts_in_one_tensor_are_in_no_subset():
    facts = discovered(Model(Opaque)).blocks[0]
    assert [s.prev for s in facts.subsets] == [None, "two"]
    assert facts.reasons == {"one+two": "experts reads it too, and its experts aren't Linears"}
    assert list(facts.loose) == ["experts"]


def test_what_is_no_linear_is_refused():
    blocks = nn.ModuleList([nn.ModuleDict({"c_attn": Conv1D(6, 4)})])
    with pytest.raises(ModelError, match="c_attn is a Conv1D, not a Linear"):
        check_linears(blocks, [(Subset(("c_attn",), None, "c_attn"),)])


class ByWeight(Block):
    """Uses a Linear's weight without calling it."""

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        read = self.norm(hidden)
        return hidden + self.out(torch.sigmoid(read @ self.one.weight.T) * self.two(read))


class Twice(Block):
    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(super().forward(hidden))


def test_a_linear_that_no_hook_would_see_is_in_no_subset():
    facts = discovered(Model(ByWeight)).blocks[0]
    assert [s.linears for s in facts.subsets] == [("two",), ("out",)]
    assert facts.subsets[0].prev is None and "isn't called as a module" in facts.loose["one"]


def test_linears_that_are_called_twice_are_in_no_subset():
    facts = discovered(Model(Twice)).blocks[0]
    assert facts.subsets == () and "2 times" in facts.loose["out"]


class Between(Model):
    def step(self, index, block, hidden, tokens):
        return block(hidden * 2 if index == 1 else hidden)


class Told(Model):
    def step(self, index, block, hidden, tokens):
        return block(hidden, extra=self.embed(tokens))


class Handing(Block):
    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        kwargs["box"][len(kwargs["box"])] = hidden
        return super().forward(hidden)


class Boxed(Model):
    def step(self, index, block, hidden, tokens):
        self.__dict__["box"] = {} if index == 0 else self.box
        return block(hidden, box=self.box)


class Skipping(Model):
    def step(self, index, block, hidden, tokens):
        return hidden if index == 1 else block(hidden)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Between(), "changes the hidden state in front of block 1"),
        (Told(), r"block 0 gets something besides the hidden state that depends on the text \(extra\)"),
        (Boxed(Handing), "hands tensors to later blocks"),
    ],
)
def test_what_a_pass_over_blocks_would_lose_is_refused(model, says):
    with pytest.raises(ModelError, match=says):
        discovered(model).adapter()


@pytest.mark.parametrize(
    ("model", "layers", "says"),
    [
        (Model(), 5, "it has no list of 5 modules"),
        (Skipping(), 3, "aren't called once each"),
        (nn.Sequential(nn.ModuleList([nn.Linear(8, 8)] * 3)), 3, "its code can't be run"),
    ],
)
def test_a_model_without_blocks_is_refused(model, layers, says):
    with pytest.raises(ModelError, match=f"no blocks were found.*{says}"):
        discovered(model, layers)


class Odd(Block):
    """As the others, but for a flag that shows nowhere else."""

    number = 0

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.hidden_flag = SimpleNamespace(odd=Odd.number == 2)
        Odd.number = (Odd.number + 1) % 3

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        read = self.norm(hidden)
        return hidden + self.out(torch.sigmoid(self.one(read)) * self.two(read + 0 if self.hidden_flag.odd else read))


def test_blocks_that_only_look_alike_are_noticed():
    with pytest.raises(ModelError, match="blocks 0 and 2 are built alike, but share their inputs differently"):
        discovered(Model(Odd)).adapter()


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_correlating_by_fft_is_multiplying_by_the_matrix(bias, monkeypatch):
    monkeypatch.setattr(exact, "_OWN", 0)
    holder = nn.Sequential(nn.Linear(37, 21, bias=bias, device="meta"))
    exact.fill(holder, "x")
    linear, inputs = holder[0], torch.randn(5, 37, dtype=torch.float64)
    expected = nn.functional.linear(inputs, linear.weight.contiguous(), linear.bias)
    torch.testing.assert_close(linear(inputs), expected, rtol=1e-12, atol=1e-12)
    with exact.own_weights([linear]):
        linear.weight.mul_(2)
        doubled = linear(inputs)
    torch.testing.assert_close(doubled - linear(inputs), inputs @ linear.weight.T, rtol=1e-12, atol=1e-12)


def test_whatever_asks_for_a_narrow_dtype_gets_float64():
    with exact.Exact():
        results = [torch.ones(2, dtype=torch.float32), torch.ones(2).double().float(), torch.ones(2).to(torch.bfloat16)]
        results.append(torch.softmax(torch.ones(2, dtype=torch.float64), -1, dtype=torch.float32))
    assert {result.dtype for result in results} == {torch.float64}
