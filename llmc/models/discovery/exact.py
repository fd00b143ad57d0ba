"""Float64 throughout, and random weights that take next to no memory."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_TO_NARROW = {Tensor.float, Tensor.half, Tensor.bfloat16}
_OWN = 2**20  # elements; what is larger shares its values along diagonals


class Exact(TorchFunctionMode):
    """Within the context whatever asks for a narrower float dtype gets float64.

    Norms, softmax and rotary embeddings of Transformers go through float32, where an error below 1e-7 would hide.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` with each narrower dtype among its arguments replaced."""
        if func in _TO_NARROW:
            return Tensor.double(args[0])
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def random_like(name: str, shape: Sequence[int], own: int = _OWN) -> Tensor:
    """Random float64 values for a parameter, the same for the same name and shape, of a size that keeps activations
    near 1.

    A tensor of more than ``own`` elements is a view of a short vector: its element ``[i, j]`` is the vector's element
    ``i + j``. That is random enough to tell rows apart, and a block of any width takes the memory of its largest matrix
    only while that is multiplied.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) < 2:
        return torch.rand(tuple(shape), generator=generator, dtype=torch.float64) + 0.5
    if math.prod(shape) <= own:
        values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    else:
        vector = torch.randn(sum(shape), generator=generator, dtype=torch.float64)
        values = vector.as_strided(tuple(shape), (1,) * len(shape))
        return values if shape[-1] == 1 else vector.div_(math.sqrt(shape[-1])).as_strided(tuple(shape), values.stride())
    return values / math.sqrt(shape[-1])


def fill(module: nn.Module, prefix: str, own: int = _OWN) -> None:
    """Give every parameter of a module on the meta device random values."""
    for path, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                values = random_like(f"{prefix}.{path}.{name}", parameter.shape, own)
                part._parameters[name] = nn.Parameter(values, requires_grad=False)


@contextmanager
def own_weights(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context the modules' parameters are copies that may be changed in place."""
    kept = [(module, name, value) for module in modules for name, value in module._parameters.items()]
    try:
        for module, name, value in kept:
            if value is not None:
                module._parameters[name] = nn.Parameter(value.detach().contiguous().clone(), requires_grad=False)
        yield
    finally:
        for module, name, value in kept:
            module._parameters[name] = value


@contextmanager
def scaled_rows(module: nn.Module, factors: Tensor, offset: float) -> Iterator[None]:
    """Within the context row ``r`` of a norm's or Linear's weight, and of its bias, is ``factors[r]`` times itself.

    Args:
        module: with a ``weight`` of one or two dimensions.
        factors: ``[rows]`` float64.
        offset: what a norm adds to its weight; the sum is what is multiplied.
    """
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    over_rows = factors if weight.dim() == 1 else factors[:, None]
    try:
        module._parameters["weight"] = nn.Parameter((weight + offset) * over_rows - offset, requires_grad=False)
        if bias is not None:
            module._parameters["bias"] = nn.Parameter(bias * factors, requires_grad=False)
        yield
    finally:
        module._parameters["weight"] = weight
        if bias is not None:
            module._parameters["bias"] = bias
