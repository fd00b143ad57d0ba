"""Function-preserving rotations: of the residual (R1) and of the value heads (R2), as in QuaRot; and what undoes one of
the feed-forward's product (R4) that runs with the model.

Ashkboos et al., QuaRot: outlier-free 4-bit inference in rotated LLMs, 2024, section 4: stage 1a, and of 1c what needs
nothing at run time. With ``Q`` orthogonal, whoever writes the residual writes ``xQ``, and whoever reads it undoes that.
RMSNorm commutes with ``Q`` once its weight is moved into its readers. LayerNorm does so too if ``Q`` also keeps the
mean (``make_rotation(keeps_mean=True)``): a model with LayerNorms stays one, nothing needs to replace them.

Arithmetic is float64, one Linear at a time; each weight is rounded once, to the dtype that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import ModelError
from ..linalg import OnlineRotation, Rotation
from .adapter import Heads, ModelAdapter, Residual, Subset
from .experts import working_on

_CHUNK = 2**22  # elements that are float64 at a time, of an embedding or head


def residual_of(adapter: ModelAdapter, config: PretrainedConfig, subsets: Collection[Subset]) -> Residual:
    """What a rotation of the residual must know of a model besides its ``subsets``, those of all blocks.

    Raises:
        ModelError: the family doesn't allow a rotation, or nobody declared who reads and writes its residual.
    """
    undeclared = any(subset.writes is None for subset in subsets)
    if adapter.residual is None or undeclared:
        raise ModelError(
            f"the adapter {adapter.name} doesn't declare who writes and reads the residual, which a rotation must know",
            "declare `residual` and each subset's `writes`, as llmc/models/llama.py does, "
            "or use a method without a rotation",
        )
    residual = adapter.residual(config)
    bare = next((subset.linears[0] for subset in subsets if subset.reads == "residual" and subset.prev is None), None)
    if bare is not None:
        raise ModelError(
            f"{bare} reads the residual, but no norm in front of it is known", "use a method without a rotation"
        )
    return residual


@dataclass(frozen=True)
class _Norm:
    """A norm's weight and bias ``[n]`` float64, to be moved into its readers; ``offset`` is what it adds to its weight.

    ``into_bias``: every reader has a bias, which takes up the norm's. Otherwise the direction does that which a
    LayerNorm's normalized output never has, that of the mean: the norm gets a bias of ones, the readers lose what they
    have in that direction, and there get what the norm's bias gave them. RMSNorms have no bias.
    """

    scale: Tensor
    shift: Tensor | None
    into_bias: bool
    offset: float = 0.0

    def fuse(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight ``[out, n]`` and bias ``[out]`` of a reader, float64, that read the bare norm."""
        fused = weight * self.scale
        if self.shift is None:
            return fused, bias
        given = weight @ self.shift
        if bias is not None and self.into_bias:
            return fused, bias + given
        return fused - fused.mean(1, keepdim=True) + given[:, None] / len(self.scale), bias

    @property
    def left(self) -> tuple[float, float]:
        """Weight and bias that the norm keeps."""
        return 1.0 - self.offset, 0.0 if self.into_bias else 1.0


@torch.no_grad()
def rotate_block(
    block: nn.Module,
    subsets: Sequence[Subset],
    heads: Heads,
    residual: Rotation,
    values: Rotation,
    ffn: OnlineRotation | None = None,
) -> None:
    """Fuse the norms of a block into their readers, and rotate it, in place.

    Args:
        block: with weights of any float dtype.
        subsets: with their ``reads`` and ``writes``; whoever reads the residual has a norm as ``prev``.
        heads: attention geometry.
        residual: R1, of the hidden size.
        values: R2, of a head's size, the same for all heads.
        ffn: R4, of the feed-forward's width, by which somebody multiplies what the readers of that space read; None:
            nobody does.
    """
    readers: dict[str, list[nn.Module]] = {}
    offsets = {str(subset.prev): subset.offset for subset in subsets}
    for subset in subsets:
        if subset.reads == "residual" and subset.prev is not None:
            names = (*subset.linears, *subset.also)
            readers.setdefault(subset.prev, []).extend(map(block.get_submodule, names))
    norms = {name: _norm(block.get_submodule(name), found, offsets[name]) for name, found in readers.items()}
    value = {subset.prev: subset for subset in subsets if subset.reads == "heads"}

    def by_head(rows: Tensor) -> Tensor:
        return values(rows.reshape(*rows.shape[:-1], -1, heads.dim)).flatten(-2)

    def value_rows(name: str, weight: Tensor) -> tuple[tuple[int, int], ...]:
        if name not in value:
            return ()
        return value[name].rows or ((0, len(weight)),)

    def rotate(subset: Subset, name: str, linear: nn.Linear) -> None:
        weight = linear.weight.double()
        bias: Tensor | None = linear.bias.double() if isinstance(linear.bias, Tensor) else None
        if subset.reads == "residual" and subset.prev is not None:
            weight, bias = norms[subset.prev].fuse(weight, bias)
            weight = residual(weight)
        elif subset.reads == "heads":
            weight = by_head(weight)
        elif subset.reads == "ffn" and ffn is not None:
            weight = ffn(weight)
        if subset.writes == "residual":  # output channels are the rows
            weight, bias = residual(weight.T).T, None if bias is None else residual(bias)
        for start, stop in value_rows(name, weight):
            weight[start:stop] = by_head(weight[start:stop].T).T
            if bias is not None:
                bias[start:stop] = by_head(bias[start:stop])
        _set(linear, weight, bias)

    for subset in subsets:
        for name in subset.linears:
            linear = _linear(block, name)
            with working_on(block, [linear]):
                rotate(subset, name, linear)
        for name in subset.also:
            reader = block.get_submodule(name)
            weight = norms[str(subset.prev)].fuse(_weight(reader), None)[0]
            _set(reader, residual(weight), None)
    for name, norm in norms.items():
        _set(block.get_submodule(name), *(torch.full_like(norm.scale, part) for part in norm.left))


def rotate_embedding(weights: Mapping[str, Tensor], declared: Residual, rotation: Rotation) -> dict[str, Tensor]:
    """Rotate what is in front of the blocks.

    Args:
        weights: by the model's parameter names; embeddings are ``[rows, n]``, Linears ``[n, in]`` with a bias ``[n]``,
            vectors ``[n]``.
        declared: which of them are added to the residual.
        rotation: R1.

    Returns:
        All of them, in their dtypes.
    """
    rows = {f"{writer}.weight" for writer in declared.writers}

    def rotated(name: str, tensor: Tensor) -> Tensor:
        owner, _, kind = name.rpartition(".")
        linear = any(fnmatchcase(owner, pattern) for pattern in declared.linears)
        if name in rows:
            return _in_chunks(tensor, rotation)
        if linear and kind == "weight":
            return rotation(tensor.double().T).T.to(tensor.dtype).contiguous()
        if name in declared.vectors or (linear and kind == "bias"):
            return rotation(tensor.double()).to(tensor.dtype)
        return tensor

    return {name: rotated(name, tensor) for name, tensor in weights.items()}


def rotate_head(weights: Mapping[str, Tensor], declared: Residual, rotation: Rotation) -> dict[str, Tensor]:
    """Fuse the last norm into its readers and rotate them.

    Args:
        weights: by the model's parameter names, the readers' among them also where they're tied to the embedding.
        declared: norm and readers.
        rotation: R1.

    Returns:
        All of them, in their dtypes.
    """
    shift_name = f"{declared.norm}.bias"
    shift = weights.get(shift_name)
    scale = weights[f"{declared.norm}.weight"].double() + declared.offset
    norm = _Norm(scale, None if shift is None else shift.double(), into_bias=False, offset=declared.offset)
    changed = dict(weights)
    changed[f"{declared.norm}.weight"] = torch.full_like(weights[f"{declared.norm}.weight"], norm.left[0])
    if shift is not None:
        changed[shift_name] = torch.full_like(shift, norm.left[1])
    for reader in declared.readers:
        weight = weights[f"{reader}.weight"]
        changed[f"{reader}.weight"] = _in_chunks(weight, lambda rows: rotation(norm.fuse(rows, None)[0]))
    return changed


def _norm(module: nn.Module, readers: Sequence[nn.Module], offset: float) -> _Norm:
    bias = getattr(module, "bias", None)
    shift = bias.double() if isinstance(bias, Tensor) else None
    biased = all(getattr(reader, "bias", None) is not None for reader in readers)
    return _Norm(_weight(module) + offset, shift, biased, offset)


def _weight(module: nn.Module) -> Tensor:
    if not isinstance(module.weight, Tensor):
        raise ModelError(f"a {type(module).__name__} has no weight to change", "use a method without a rotation")
    return module.weight.double()


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a Linear")
    return module


def _set(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Round to the dtype that the module's parameters have."""
    for name, value in (("weight", weight), ("bias", bias)):
        parameter = getattr(module, name, None)
        if isinstance(parameter, nn.Parameter) and value is not None:
            parameter.copy_(value)


def _in_chunks(weight: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change ``[rows, n]`` in float64, some rows at a time, and round to its dtype."""
    result = torch.empty_like(weight)
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        result[start : start + step] = change(weight[start : start + step].double())
    return result
