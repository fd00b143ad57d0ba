"""The experts of a mixture as Linears: Transformers keeps them in two three-dimensional parameters, which no algorithm
could read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RoutedInputs:
    """What the experts of a layer read of one batch.

    Attributes:
        of: rows ``[tokens, in]`` that an expert reads.
        tokens: how many they are.
        common: whether all experts read the same rows.
    """

    of: Callable[[int], Tensor]
    tokens: Callable[[int], int]
    common: bool = False


class HostMemory:
    """Keeps weights in the host's memory while nobody needs them: for a block that is too large for the device.

    Args:
        device: where the tokens are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight is there."""
        return weight.device != self._device

    def fetch(self, weight: Tensor) -> Tensor:
        """A weight where the tokens are."""
        return weight.to(self._device, non_blocking=True)

    def here(self, tensor: Tensor) -> Tensor:
        """A tensor where the tokens are: fetched, if it is kept."""
        return self.fetch(tensor) if self.holds(tensor) else tensor

    def store(self, weight: Tensor) -> Tensor:
        """The way back."""
        return weight.cpu()

    def has_room_for(self, size: int) -> bool:
        """Whether ``size`` bytes of weights may all be where the tokens are, with as much again for what is tried in
        their place. Whoever finds none brings them one by one."""
        if self._device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return 3 * size <= free + unused


class Port(nn.Module):
    """A place between two operations of a layer of experts where somebody may look at what comes next, or wait."""

    def forward(self, inputs: RoutedInputs) -> None:
        """Do nothing. A forward pre-hook sees ``inputs``."""


class Expert(nn.Module):
    """A gated feed-forward part: three Linears, with or without biases, of the device and dtype of ``like``."""

    def __init__(self, hidden: int, inner: int, *, bias: bool, like: Tensor) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias, device=like.device, dtype=like.dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=bias, device=like.device, dtype=like.dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=bias, device=like.device, dtype=like.dtype)


class LinearExperts(nn.Module):
    """Computes what the module that it replaces does, by the same operations in the same order, one expert at a time.

    All inputs of the first Linears are known when ``entrance`` is called, all those of the last when ``between`` is.

    Args:
        fused: an experts module of Transformers with ``gate_up_proj`` and ``down_proj`` of all experts.

    Attributes:
        all_tokens: whether the ports show all tokens to every expert, whether or not they are routed to it.
        home: where the weights are while nobody needs them; None: with the tokens. They visit one expert at a time.
        visiting: what those came from that are visiting now, by the address of their storage.
    """

    home: HostMemory | None = None

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.visiting: dict[int, Tensor] = {}
        transposed = _is_transposed(fused)
        count, hidden, both = fused.gate_up_proj.shape if transposed else fused.gate_up_proj.transpose(1, 2).shape
        bias = getattr(fused, "gate_up_proj_bias", None) is not None
        self.count = count
        self.all_tokens = False
        for expert in range(count):
            self.add_module(str(expert), Expert(hidden, both // 2, bias=bias, like=fused.gate_up_proj))
        self.entrance, self.between = Port(), Port()
        self._activate: Callable[[Tensor, Tensor], Tensor]
        self.__dict__["_activate"] = _activation(fused)

    def expert(self, index: int) -> Expert:
        """One of them."""
        found = self.get_submodule(str(index))
        if not isinstance(found, Expert):
            raise TypeError(f"{index} isn't an expert")
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Route ``[tokens, hidden]`` by indices and weights ``[tokens, chosen]``; summed over experts in that shape."""
        routes = [torch.where((top_k_index == expert).T)[::-1] for expert in range(self.count)]
        products = self._products(hidden_states, [tokens for tokens, _ in routes])
        result = torch.zeros_like(hidden_states)
        for index, (tokens, slots) in enumerate(routes):
            if len(tokens):
                with self.visit(index):
                    output = self.expert(index).down_proj(products[index])
                output = output * top_k_weights[tokens, slots, None]
                result.index_add_(0, tokens, output.to(result.dtype))
        return result

    def _products(self, hidden: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
        """What the last Linears read, ``[tokens of the expert, inner]`` each."""
        everyone = self.all_tokens
        self.entrance(
            RoutedInputs(
                lambda index: hidden if everyone else hidden[rows[index]],
                lambda index: len(hidden) if everyone else len(rows[index]),
                everyone,
            )
        )
        products = [self.inner(index, hidden[tokens]) for index, tokens in enumerate(rows)]
        self.between(
            RoutedInputs(
                lambda index: self.inner(index, hidden) if everyone else products[index],
                lambda index: len(hidden) if everyone else len(rows[index]),
            )
        )
        return products

    def inner(self, index: int, inputs: Tensor) -> Tensor:
        """What the last Linear of an expert reads, ``[tokens, inner]``, given its first ones' input."""
        expert = self.expert(index)
        with self.visit(index):
            return self._activate(expert.gate_proj(inputs), expert.up_proj(inputs))

    @contextmanager
    def visit(self, index: int) -> Iterator[None]:
        """Within the context an expert's weights are where the tokens are; they don't change meanwhile."""
        home = self.home
        if home is None:
            yield
            return
        held = [(one, one.data) for one in self.expert(index).parameters() if home.holds(one.data)]
        for parameter, data in held:
            parameter.data = home.fetch(data)
            self.visiting[parameter.data.untyped_storage().data_ptr()] = data
        try:
            yield
        finally:
            self.visiting.clear()
            for parameter, data in held:
                parameter.data = data

    @contextmanager
    def work_on(self, linears: Iterable[nn.Module]) -> Iterator[None]:
        """Within the context some Linears' weights are where the tokens are; what they then are goes back."""
        home = self.home
        if home is None:
            yield
            return
        every = {id(one): one for linear in linears for one in linear.parameters(recurse=False)}
        fetched = [one for one in every.values() if home.holds(one.data)]
        for parameter in fetched:
            parameter.data = home.fetch(parameter.data)
        try:
            yield
        finally:
            for parameter in fetched:
                parameter.data = home.store(parameter.data)


class StackedExperts(LinearExperts):
    """The same where each token has been multiplied by its weight beforehand, a copy for every expert (Llama 4)."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Of ``[experts * tokens, hidden]`` those rows that aren't 0 are routed; outputs in the same places."""
        by_expert = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        routed = (by_expert != 0).any(-1)
        flat = [torch.where(own)[0] + index * by_expert.shape[1] for index, own in enumerate(routed)]
        products = self._products(hidden_states, flat)
        result = torch.zeros_like(hidden_states)
        for index, rows in enumerate(flat):
            if len(rows):
                with self.visit(index):
                    result[rows] = self.expert(index).down_proj(products[index])
        return result


def _is_transposed(fused: Any) -> bool:
    """Whether its matrices are ``[in, out]``."""
    known = getattr(fused, "is_transposed", None)
    return bool(known) if known is not None else fused.gate_up_proj.shape[1] == fused.down_proj.shape[2]


def _activation(fused: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """What becomes of the outputs of gate and up."""
    act = getattr(fused, "act_fn", None)
    if act is not None:
        return lambda gate, up: act(gate) * up
    apply_gate = fused._apply_gate  # of an interleaved pair (gpt-oss)
    return lambda gate, up: apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))


@contextmanager
def working_on(block: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context the weights of those modules that are experts' are where the tokens are, and may change."""
    wanted = list(modules)
    with ExitStack() as stack:
        for experts in block.modules():
            if isinstance(experts, LinearExperts):
                own = set(experts.modules())
                stack.enter_context(experts.work_on([module for module in wanted if module in own]))
        yield


@contextmanager
def fetched_again(block: nn.Module) -> Iterator[None]:
    """Within the context gradients go through experts that visit: their weights aren't kept for the way back, but visit
    again when it comes."""
    visitors = [module for module in block.modules() if isinstance(module, LinearExperts) and module.home is not None]

    def pack(tensor: Tensor) -> tuple[Tensor, HostMemory | None, Any]:
        address = tensor.untyped_storage().data_ptr()
        for experts in visitors:
            if address in experts.visiting:
                return experts.visiting[address], experts.home, (tensor.shape, tensor.stride(), tensor.storage_offset())
        return tensor, None, None

    def unpack(kept: tuple[Tensor, HostMemory | None, Any]) -> Tensor:
        tensor, home, view = kept
        return tensor if home is None else home.fetch(tensor).as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack) if visitors else nullcontext():
        yield


def linearize_experts(model: nn.Module) -> list[str]:
    """Replace the experts of every layer by Linears, in place; names of the replaced modules.

    Where the router weights the tokens in front of the experts, they get one tensor of weighted copies instead of the
    routing.
    """
    found = []
    for name, module in list(model.named_modules()):
        parts = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
        if all(isinstance(part, nn.Parameter) and part.dim() == 3 for part in parts):
            routed = hasattr(module, "is_transposed")  # the mark of Transformers' interface of routed experts
            model.set_submodule(name, LinearExperts(module) if routed else StackedExperts(module))
            found.append(name)
    return found
