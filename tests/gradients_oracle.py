"""What the whole model, in memory at once, knows of its Linears' outputs: the oracle of the pass block by block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import Tiny
from torch import Tensor, nn

from llmc.stream.activations import ActivationStore
from llmc.stream.batch import Batch
from llmc.stream.gradients import Gradients, Outputs

SEED = 7
Seen = dict[str, tuple[int, float, float]]
"""Of each Linear its tokens, and the sums of squares of outputs and gradients."""


def streamed(tiny: Tiny, batches: list[Tensor], folder: Path) -> list[dict[str, Outputs]]:
    """Block by block."""
    skeleton = tiny.skeleton()
    source = tiny.source(skeleton)
    found = Gradients(
        skeleton=skeleton,
        source=source,
        batches=[Batch(tokens) for tokens in batches],
        linears=[[name for subset in own for name in subset.linears] for own in tiny.block_subsets],
        store=ActivationStore(folder, budget=0),
        device=torch.device("cpu"),
        seed=SEED,
        phase=lambda text: None,
    ).run()
    source.close()
    assert all(parameter.is_meta for parameter in skeleton.blocks.parameters())
    return found


def whole(tiny: Tiny, batches: list[Tensor]) -> list[Seen]:
    """By automatic differentiation through everything."""
    skeleton = tiny.loaded()
    model = skeleton.model
    model.requires_grad_(False)
    found: list[Seen] = [{} for _ in skeleton.blocks]

    def look(seen: Seen, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            def back(gradient: Tensor) -> None:
                tokens, squares, gradients = seen[name]
                seen[name] = tokens, squares, gradients + float(gradient.double().square().sum())

            tokens, squares, gradients = seen.get(name, (0, 0.0, 0.0))
            rows = output.numel() // output.shape[-1]
            seen[name] = tokens + rows, squares + float(output.double().square().sum()), gradients
            if output.requires_grad:
                output.register_hook(back)

        return hook

    for seen, block, own in zip(found, skeleton.blocks, tiny.block_subsets, strict=True):
        for subset in own:
            for name in subset.linears:
                block.get_submodule(name).register_forward_hook(look(seen, name))
    generator = torch.Generator().manual_seed(SEED)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for tokens in batches:
        logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return found


def assert_alike(found: list[dict[str, Outputs]], expected: list[Seen]) -> None:
    """Every number of every Linear."""
    assert len(found) == len(expected)
    for own, seen in zip(found, expected, strict=True):
        assert seen
        for name, one in own.items():
            tokens, squares, gradients = seen.get(name, (0, 0.0, 0.0))
            assert one.tokens == tokens
            assert one.squares == pytest.approx(squares, rel=1e-5)
            assert one.gradients == pytest.approx(gradients, rel=1e-4, abs=1e-12)
