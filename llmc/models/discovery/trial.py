"""Runs one block on random weights and inputs, and notes which tensor each of its modules reads and makes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ..experts import LinearExperts
from .calls import BlockCall, same_values
from .exact import Exact

Key = tuple[int, int, int, int, int]


def key_of(tensor: Tensor) -> Key:
    """Equal for two views of the same elements, as they are at the same moment, with rows of the same length."""
    storage = tensor.untyped_storage().data_ptr()
    return storage, int(tensor.storage_offset()), tensor.numel(), tensor.shape[-1], tensor._version


@dataclass
class Seen:
    """A module's calls in one run of the block: for each its tensors in, and the first of those out, all copied, since
    models change some in place; and whether it gave a tensor alone each time."""

    module: nn.Module
    inputs: list[list[tuple[Key, Tensor]]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    plain: bool = True

    @property
    def linear(self) -> bool:
        """Whether it was called once and did what a Linear does, which one that chooses experts doesn't."""
        return isinstance(self.module, nn.Linear) and self.single

    @property
    def routed(self) -> bool:
        """Whether it's a mixture's experts, which were called once."""
        return isinstance(self.module, LinearExperts) and self.single

    @property
    def single(self) -> bool:
        """Whether it was called once and gave one tensor."""
        return self.plain and len(self.outputs) == 1

    def reads(self, key: Key) -> bool:
        """Whether it was called with that tensor."""
        return any(key == found for call in self.inputs for found, _ in call)


@dataclass(frozen=True)
class Run:
    """What one run showed: the block's output ``[batch, tokens, hidden]`` and its modules in the order of their
    calls."""

    output: Tensor
    seen: Mapping[str, Seen]

    def input_of(self, part: str) -> Tensor:
        """What a module read first."""
        return self.seen[part].inputs[0][0][1]


class Trial:
    """A block with random weights, and its calls.

    Args:
        block: the module.
        calls: its call for each shape ``(batch, tokens)``.
        hidden: channels of the hidden state.
    """

    def __init__(self, block: nn.Module, calls: Mapping[tuple[int, int], BlockCall], hidden: int) -> None:
        self.block, self._calls = block, calls
        generator = torch.Generator().manual_seed(1)
        self.inputs = {shape: torch.randn(*shape, hidden, generator=generator, dtype=torch.float64) for shape in calls}
        self.parts = {
            name: part
            for name, part in block.named_modules()
            if isinstance(part, LinearExperts) or any(value is not None for value in part._parameters.values())
        }
        for path in [name for name, part in self.parts.items() if isinstance(part, LinearExperts)]:
            self.parts = {name: part for name, part in self.parts.items() if not name.startswith(f"{path}.")}

    @torch.no_grad()
    def output(self, shape: tuple[int, int]) -> Tensor:
        """The block's output.

        Raises:
            ModelError: it can't be run on its own, or changes an argument.
        """
        call = self._calls[shape]
        holders = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Mapping)]
        before = [dict(holder) for holder in holders]
        try:
            with Exact():
                result = self.block(self.inputs[shape].clone(), *call.args, **call.kwargs)
        except Exception as problem:  # the model's own code
            reason = f"a block can't be run on its own ({type(problem).__name__}: {problem})"
            raise ModelError(reason, "it needs an adapter of its own") from problem
        if not all(same_values(dict(holder), kept) for holder, kept in zip(holders, before, strict=True)):
            raise ModelError(
                "a block hands tensors to later blocks besides the hidden state, which a pass over single blocks "
                "would lose",
                "it needs an adapter of its own",
            )
        hidden = result[0] if isinstance(result, tuple) else result
        if not isinstance(hidden, Tensor) or hidden.shape != self.inputs[shape].shape:
            raise ModelError("a block doesn't return its hidden state", "it needs an adapter of its own")
        return hidden

    def run(self, shape: tuple[int, int], modules: Sequence[str] | None = None) -> Run:
        """Run the block and note the calls of its parts that own parameters, or of these modules. A mixture's experts,
        of which each sees some of the tokens, are one part."""
        parts = self.parts if modules is None else {name: self.block.get_submodule(name) for name in modules}
        seen: dict[str, Seen] = {}
        alive: list[Tensor] = []  # while the block runs, so that no two tensors share an address

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
                found = seen.setdefault(name, Seen(module))
                found.inputs.append([(key_of(tensor), tensor.clone()) for tensor in given])
                alive.extend(given)

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
                tensor = result[0] if isinstance(result, tuple) else result
                seen[name].plain &= tensor is result
                if isinstance(tensor, Tensor):
                    seen[name].outputs.append(tensor.clone())

            return hook

        hooks = [part.register_forward_pre_hook(before(name), with_kwargs=True) for name, part in parts.items()]
        hooks += [part.register_forward_hook(after(name), with_kwargs=True) for name, part in parts.items()]
        try:
            return Run(self.output(shape), seen)
        finally:
            for hook in hooks:
                hook.remove()


def working_parts(run: Run, opaque: Collection[str]) -> list[str]:
    """The Linears of a block, its experts, and the modules that do Linears' work without being any."""
    return [name for name, seen in run.seen.items() if seen.linear or seen.routed or (name in opaque and seen.single)]


@contextmanager
def held(run: Run, parts: Collection[str], changed: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context modules return what they did in a run, or what is given for them, whatever they're called
    with."""

    def returning(result: Tensor) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: result.clone()

    kept = [(run.seen[name].module, run.seen[name].module.__dict__.get("forward")) for name in parts]
    try:
        for name in parts:
            result = changed.get(name, run.seen[name].outputs[0])
            setattr(run.seen[name].module, "forward", returning(result))  # noqa: B010
        yield
    finally:
        for module, forward in kept:
            del module.forward
            if forward is not None:
                setattr(module, "forward", forward)  # noqa: B010
