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


def random_like(name: str, shape: Sequence[int]) -> Tensor:
    """Random float64 values for a parameter, the same for the same name and shape, of a size that keeps activations
    near 1: weights of norms between 1/2 and 3/2, biases small, so that about half of all values are positive.

    A large tensor is a view of a short vector: its element ``[i, j]`` is the vector's element ``i + j`` (a Hankel
    matrix). That is random enough to tell rows apart, and takes next to no memory, whatever a model's width.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("bias"):
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64) / 10
    if len(shape) < 2:
        return torch.rand(tuple(shape), generator=generator, dtype=torch.float64) + 0.5
    if math.prod(shape) <= _OWN:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])
    vector = torch.randn(sum(shape), generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])
    return vector.as_strided(tuple(shape), (1,) * len(shape))


def fill(module: nn.Module, prefix: str) -> None:
    """Give every parameter of a module on the meta device random values."""
    for path, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                values = random_like(f"{prefix}.{path}.{name}", parameter.shape)
                part._parameters[name] = nn.Parameter(values, requires_grad=False)
        if type(part) is nn.Linear and part.weight.stride() == (1, 1):
            setattr(part, "forward", _Correlation(part))  # noqa: B010


class _Correlation:
    """Forward of a Linear whose weight is a Hankel matrix: it correlates the input with the vector behind it, by FFT,
    without ever making the matrix. Once the Linear has another weight, it does what any Linear does."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear, self._weight = linear, linear.weight
        rows, columns = linear.weight.shape
        self._length = 2 ** math.ceil(math.log2(rows + columns))
        vector = linear.weight.as_strided((rows + columns - 1,), (1,))
        self._spectrum = torch.fft.rfft(vector, self._length)

    def __call__(self, inputs: Tensor) -> Tensor:
        if self._linear.weight is not self._weight:
            return nn.functional.linear(inputs, self._linear.weight, self._linear.bias)
        if not inputs.numel():  # an expert without tokens; there is no FFT of nothing
            return inputs.new_zeros(*inputs.shape[:-1], len(self._weight))
        product: Tensor = self._spectrum * torch.fft.rfft(inputs, self._length).conj()
        outputs: Tensor = torch.fft.irfft(product, self._length)[..., : len(self._weight)]
        if self._linear.bias is None:
            return outputs.contiguous()
        return torch.add(outputs, self._linear.bias)


@contextmanager
def own_weights(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context the modules' parameters are copies that may be changed in place."""
    kept = [(module, name, value) for module in modules for name, value in module._parameters.items()]
    try:
        for module, name, value in kept:
            if value is not None:
                module._parameters[name] = nn.Parameter(
                    value.detach().clone(memory_format=torch.contiguous_format), requires_grad=False
                )
        yield
    finally:
        for module, name, value in kept:
            module._parameters[name] = value


@contextmanager
def scaled_norm(norm: nn.Module, factors: Tensor, offset: float) -> Iterator[None]:
    """Within the context a norm's weight ``[n]``, and its bias, are multiplied by ``factors``.

    Args:
        norm: the module.
        factors: ``[n]`` float64.
        offset: what the norm adds to its weight; the sum is multiplied.
    """
    with own_weights([norm]), torch.no_grad():
        for name, parameter in norm._parameters.items():
            added = offset if name == "weight" else 0.0
            if name in ("weight", "bias") and parameter is not None:
                parameter.copy_((parameter + added) * factors - added)
        yield


@contextmanager
def scaled_inputs(modules: Sequence[nn.Module], factors: Tensor) -> Iterator[None]:
    """Within the context what the modules read, ``[.., n]``, is multiplied by ``factors`` ``[n]``."""

    def hook(module: nn.Module, args: Any) -> Any:
        return (args[0] * factors, *args[1:])

    hooks = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
