"""A folder's weights beside another's: the evaluated model's, which are equal, or the original's, which are near.

Against the model that was evaluated (``save_fake``) every weight is equal bit for bit. Against the model that was
rounded, two numbers of each weight are looked at: its relative error ``|W' - W| / |W|``, which is 1 of zeros and about
1.4 of a permuted weight; and how far runs of 32 values are from the right size: the factor that fits ``W'`` to ``W``
best, less 1, as a root mean square over the runs. Rounding hardly changes it, for its errors are even; exchanged scales
do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..export import read_config
from ..stream.headers import TensorEntry, read_headers
from ..stream.source import read_tensor
from .findings import Report
from .layouts import DENSE
from .structure import Module

_RUN = 32
_WORST = 1.0  # nothing at all in a weight's place has this error
_OUTLIER = 5.0  # times the median gain of Linears of one name; GPTQ's varies by 3, exchanged scales change it tenfold
_LEAST = 0.05  # below that nothing is out of line
_NARROW = 2.0**-7  # products of a code and a scale, rounded to bfloat16 here and to float16 there
_ENOUGH = 8  # Linears of one name, to have a median that some damaged ones don't move
_ORIGINAL = "export the folder again; if a method changed the model before it was rounded, compare with save_fake"


@dataclass(frozen=True)
class Difference:
    """How a weight differs.

    Attributes:
        name: of the tensor or module.
        file: that has it.
        error: relative error.
        gain: how far runs of values are from the right size.
        equal: bit for bit, in the other folder's dtype.
        close: but for the rounding of products.
        first: where it begins.
    """

    name: str
    file: str
    error: float
    gain: float
    equal: bool
    close: bool
    first: tuple[int, ...]


class Comparison:
    """Collects differences, and judges them when all are known.

    Args:
        model: the other folder: dense, and as large.

    Raises:
        CheckpointError: it can't be read, or is quantized itself.
    """

    def __init__(self, model: Path) -> None:
        self._entries: Mapping[str, TensorEntry] = read_headers(model)
        if (model / "config.json").is_file() and read_config(model).get("quantization_config"):
            raise CheckpointError(
                f"--against {model}: it is quantized itself",
                "name a folder with plain weights: save_fake's, or the original",
            )
        self._weights: list[Difference] = []
        self._plain: list[Difference] = []
        self._dense: list[Difference] = []
        self._unread: list[str] = []
        self._missing: list[str] = []
        self._shapes: list[tuple[str, str, str]] = []

    def weight(self, module: Module, dense: Tensor | None) -> None:
        """A Linear or embedding; ``dense`` is None where nothing can read it."""
        name = f"{module.name}.weight"
        file = next(iter(module.parts.values())).file.name
        if dense is None:
            self._unread.append(module.name)
        elif (other := self._other(name, file, tuple(dense.shape))) is not None:
            found = difference(module.name, file, dense, other)
            (self._dense if module.layout == DENSE else self._weights).append(found)

    def plain(self, name: str, entry: TensorEntry, tensor: Tensor) -> None:
        """Anything else."""
        if (
            other := self._other(name, entry.file.name, tuple(tensor.shape))
        ) is not None and tensor.is_floating_point():
            self._plain.append(difference(name, entry.file.name, tensor, other))

    def judge(self, report: Report) -> None:
        """Report what is out of line."""
        if self._weights:
            self._plain += self._dense
        else:  # nothing is stored quantized: a folder such as save_fake's, whose Linears may differ
            self._weights = self._dense
        for name, file, problem in self._shapes:
            report.found(file, name, problem, "does MODEL belong to this folder?")
        if self._judge_plain(report):
            self._judge_weights(report)
        if self._unread:
            report.notes.append(f"not compared, nothing here reads them: {_some(self._unread)}")
        if self._missing:
            report.notes.append(f"not compared, the other folder has none: {_some(self._missing)}")

    def _other(self, name: str, file: str, shape: tuple[int, ...]) -> Tensor | None:
        if name not in self._entries:
            self._missing.append(name)
            return None
        if self._entries[name].shape != shape:
            self._shapes.append(
                (name, file, f"has the shape {list(shape)}, in MODEL {list(self._entries[name].shape)}")
            )
            return None
        return read_tensor(self._entries[name])

    def _judge_weights(self, report: Report) -> None:
        if not self._weights:
            return
        worst = max(self._weights, key=lambda one: one.error)
        equal, close = (sum(flags) for flags in ([d.equal for d in self._weights], [d.close for d in self._weights]))
        count = len(self._weights)
        if 2 * equal >= count or 2 * close >= count:
            exact = 2 * equal >= count
            for one in self._weights:
                if not (one.equal if exact else one.close):
                    report.found(one.file, one.name, f"differs from MODEL, first at {list(one.first)}, {_size(one)}")
            how = "bit for bit" if exact else "but for the rounding of code times scale"
            report.checked.append(f"against MODEL: {equal if exact else close} of {count} weights equal {how}")
            return
        for one, problem in _outliers(self._weights):
            report.found(one.file, one.name, problem, _ORIGINAL)
        report.checked.append(
            f"against MODEL: {count} weights, relative error {median(d.error for d in self._weights):.2e} "
            f"(median), {worst.error:.2e} (worst: {worst.name})"
        )

    def _judge_plain(self, report: Report) -> bool:
        """Whether the folders have one model: then what wasn't rounded is the same."""
        differing = [one for one in self._plain if not one.equal]
        if len(differing) > max(1, len(self._plain) // 3):
            report.found(
                differing[0].file,
                differing[0].name,
                f"and {len(differing) - 1} more tensors that aren't quantized differ from MODEL: it isn't the model "
                "that was rounded here",
                "compare with save_fake, or with save_trans, of the same run",
            )
            return False
        for one in differing:
            report.found(one.file, one.name, f"isn't quantized, and differs from MODEL, {_size(one)}")
        report.checked.append(f"against MODEL: {len(self._plain) - len(differing)} of {len(self._plain)} others equal")
        return True


def difference(name: str, file: str, mine: Tensor, other: Tensor) -> Difference:
    """Compare a tensor with the other folder's, computed in float32."""
    same = _equal(mine, other)
    left, right = mine.float(), other.float()
    gap = left - right
    close = bool((gap.abs() <= _NARROW * right.abs()).all())
    norm = float(right.norm())
    error = float(gap.norm()) / norm if norm else (0.0 if same else float("inf"))
    wrong = (gap != 0).reshape(-1)
    flat = int(wrong.nonzero()[0]) if not same and bool(wrong.any()) else 0
    place = torch.unravel_index(torch.tensor(flat), left.shape) if left.ndim else ()
    return Difference(name, file, error, _gain(left, right), same, close, tuple(int(index) for index in place))


def _equal(mine: Tensor, other: Tensor) -> bool:
    """Whether both hold the same numbers, one of them rounded to the dtype of the other."""
    return torch.equal(mine.to(other.dtype), other) or torch.equal(other.to(mine.dtype), mine)


def _gain(mine: Tensor, other: Tensor) -> float:
    """How far the factor that fits each run of ``mine`` to ``other`` is from 1, as a root mean square over energy."""
    usable = mine.numel() // _RUN * _RUN
    left, right = (tensor.reshape(-1)[:usable].reshape(-1, _RUN) for tensor in (mine, other))
    energy = left.square().sum(1)
    total = float(energy.sum())
    if not total:
        return 0.0
    factor = (left * right).sum(1) / energy.clamp(min=torch.finfo(torch.float32).tiny)
    return math.sqrt(float(((factor - 1).square() * energy).sum()) / total)


def _outliers(weights: Sequence[Difference]) -> list[tuple[Difference, str]]:
    """Weights that have nothing to do with MODEL's, or that are of another size than others of their name."""
    found = []
    for one in weights:
        alike = [other for other in weights if other.name.rpartition(".")[2] == one.name.rpartition(".")[2]]
        alike = alike if len(alike) >= _ENOUGH else list(weights)
        gain = median(other.gain for other in alike)
        if not one.error < _WORST:
            found.append((one, f"has nothing to do with MODEL's: {_size(one)}"))
        elif one.gain > max(_LEAST, _OUTLIER * gain):
            usual = f"{gain:.1%} is usual; {_size(one)}"
            found.append((one, f"has runs of another size than MODEL's, off by {one.gain:.1%}, where {usual}"))
    return found


def _size(one: Difference) -> str:
    return f"relative error {one.error:.2e}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
