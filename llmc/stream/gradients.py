"""How much the model's final output depends on each Linear's: a pass forward, and one backward, block by block.

The hidden states in front of all blocks wait in the store while the blocks go by; in reverse order each block is read
again, run with gradients, and takes the gradient of its outputs to that of its inputs. In memory is one block, besides
what the store decides to keep there.

The loss is the cross entropy to tokens that are drawn from the model's own distribution, so that the mean square of a
gradient is the Fisher information (Martens, *New insights and perspectives on the natural gradient method*, 2020,
section 5): half of ``eᵀ F e`` is by how many nats a small error ``e`` moves that distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .activations import ActivationStore, Stream
from .batch import Batch
from .calls import head_logits
from .entrance import Entrance
from .memory import give_back_memory, short_collections
from .skeleton import EMBED, HEAD, Skeleton, block_unit
from .source import BlockSource
from .stages import BlockRun
from .training import repeatable
from .visits import Visits

_HEAD_TOKENS = 256  # logits, and their gradients, are made for so many tokens at a time
_GRADIENT = "gradient"


@dataclass
class Outputs:
    """What was seen of a Linear's outputs ``[tokens, out]``.

    Attributes:
        width: ``out``.
        tokens: how many came.
        squares: sum of squares of the outputs.
        gradients: sum of squares of the loss's gradient to them.
    """

    width: int
    tokens: int = 0
    squares: float = 0.0
    gradients: float = 0.0

    def importance(self, tokens: int) -> float:
        """Nats per token by which the model's output moves, per relative error of this Linear's output.

        The Fisher information of an output is taken to be the same for all channels: ``½ mean(g²) sum(y²) / tokens``.

        Args:
            tokens: of the whole text; fewer may have come here.
        """
        if not self.tokens or not tokens:
            return 0.0
        return 0.5 * self.gradients / (self.tokens * self.width) * self.squares / tokens


class Gradients:
    """Measures the outputs of Linears of the original model.

    Args:
        skeleton: the empty model; it is empty again afterwards.
        source: its weights. All are read twice.
        batches: what the model is given.
        linears: of each block, the names of those to be measured.
        store: for streams; nothing else may be in it.
        device: where to compute.
        seed: of the tokens that are drawn.
        phase: hears what is going on.
    """

    def __init__(
        self,
        *,
        skeleton: Skeleton,
        source: BlockSource,
        batches: Sequence[Batch],
        linears: Sequence[Sequence[str]],
        store: ActivationStore,
        device: torch.device,
        seed: int,
        phase: Callable[[str], None],
    ) -> None:
        self._skeleton, self._source, self._batches, self._linears = skeleton, source, batches, linears
        self._store, self._device, self._phase = store, device, phase
        self._entrance = Entrance(skeleton, store, device)
        self._generator = torch.Generator().manual_seed(seed)
        self._shapes = [(*batch.shape, skeleton.model.config.get_text_config().hidden_size) for batch in batches]

    def run(self) -> list[dict[str, Outputs]]:
        """Of each block, what was seen of its Linears, by name.

        Raises:
            CheckpointError: a weight is missing, misshapen, NaN or infinite.
        """
        with short_collections(), repeatable(self._device):
            with torch.no_grad():
                self._forward()
            self._head()
            found = [self._backward(index) for index in reversed(range(len(self._skeleton.blocks)))]
            self._store.streams.clear()
        return found[::-1]

    def _forward(self) -> None:
        """Fill a stream with the inputs of each block, and one with the outputs of the last."""
        self._load(EMBED, block_unit(0))
        self._entrance.fill(_inputs(0), self._batches, keep=True)
        self._skeleton.release_unit(EMBED)
        count = len(self._skeleton.blocks)
        for index in range(count):
            self._phase(f"sensitivity: forward, block {index + 1}/{count}")
            self._load(block_unit(index), block_unit(index + 1) if index + 1 < count else HEAD)
            run = self._run(index)
            outputs = self._store.add(_inputs(index + 1), self._shapes, self._skeleton.model.dtype)
            for batch in range(len(run.inputs)):
                outputs.store(batch, run.forward(batch))
            self._release(run.block)

    def _head(self) -> None:
        """Fill the stream of gradients with those of the last block's outputs."""
        self._phase("sensitivity: head")
        hidden = self._store.streams.pop(_inputs(len(self._skeleton.blocks)))
        gradients = self._store.add(_GRADIENT, self._shapes, torch.float32)
        tied = self._source.take(EMBED) if self._skeleton.tied_head else {}
        self._skeleton.load(self._source.take(HEAD) | tied)
        self._source.prefetch(block_unit(len(self._skeleton.blocks) - 1))
        self._skeleton.tie()
        for index, batch in enumerate(self._batches):
            whole, tokens = hidden.load(index, self._device), batch.tokens.to(self._device)
            parts = [
                self._head_gradient(part, own)
                for part, own in zip(
                    torch.split(whole, _HEAD_TOKENS, 1), torch.split(tokens, _HEAD_TOKENS, 1), strict=True
                )
            ]
            gradients.store(index, torch.cat(parts, dim=1))
        self._skeleton.release_unit(HEAD)
        if tied:
            self._skeleton.release_unit(EMBED)
        give_back_memory()

    def _head_gradient(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """That of the loss to ``hidden`` ``[batch, tokens, hidden]``."""
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad(), _frozen(self._skeleton.model):
            logits = head_logits(self._skeleton, leaf, tokens).flatten(0, 1)
            odds = logits.detach().softmax(-1).cpu()
            drawn = torch.multinomial(odds, 1, generator=self._generator)[:, 0].to(logits.device)
            loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            return torch.autograd.grad(loss, leaf)[0]

    def _backward(self, index: int) -> dict[str, Outputs]:
        """Bring the gradients in front of a block."""
        self._phase(f"sensitivity: backward, block {index + 1}/{len(self._skeleton.blocks)}")
        self._load(block_unit(index), block_unit(index - 1) if index else None)
        run, gradients = self._run(index), self._store.streams[_GRADIENT]
        linears = {name: _linear(run.block, name) for name in self._linears[index]}
        with (
            torch.enable_grad(),
            _frozen(run.block),
            Visits.of(run.block).for_gradients(),
            _watching(linears) as found,
        ):
            for batch in range(len(run.inputs)):
                gradients.store(batch, _through(run, batch, gradients))
        del self._store.streams[_inputs(index)]
        self._release(run.block)
        return found

    def _run(self, index: int) -> BlockRun:
        return self._entrance.run(index, _inputs(index), self._batches)

    def _load(self, unit: str, following: str | None) -> None:
        weights = self._source.take(unit)
        if following is not None:
            self._source.prefetch(following)
        self._skeleton.load(weights)

    def _release(self, block: nn.Module) -> None:
        self._skeleton.release(block)
        give_back_memory()


def _inputs(index: int) -> str:
    """The stream of a block's inputs."""
    return f"inputs.{index}"


def _through(run: BlockRun, batch: int, gradients: Stream) -> Tensor:
    """The gradient in front of a block, ``[batch, tokens, hidden]``, from the one behind it."""
    leaf = run.inputs.load(batch, run.device).detach().requires_grad_()
    output = run.calls[batch](run.block, leaf)
    behind = gradients.load(batch, run.device).to(output.dtype)
    return torch.autograd.grad(output, leaf, behind)[0]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within the context gradients go through a module without reaching for its weights."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a Linear")
    return module


@contextmanager
def _watching(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, Outputs]]:
    """What comes out of Linears within the context, and the gradients that come back."""
    found = {name: Outputs(linear.out_features) for name, linear in linears.items()}
    hooks = [linear.register_forward_hook(partial(_look, found[name])) for name, linear in linears.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _look(seen: Outputs, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    def back(gradient: Tensor) -> None:
        seen.gradients += float(gradient.float().square().sum(dtype=torch.float64))

    seen.tokens += output.numel() // seen.width
    seen.squares += float(output.detach().float().square().sum(dtype=torch.float64))
    if output.requires_grad:
        hooked: Any = output  # its registration has no annotations
        hooked.register_hook(back)
