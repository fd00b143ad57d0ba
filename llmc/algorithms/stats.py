"""Statistics that are accumulated over the calibration tokens, batch by batch; the tokens themselves aren't kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..quant import Accumulator, ActSpec, QWeight, squared_norm

_PANEL = 256  # columns of a Gram panel: wide enough for a full-speed product, narrow enough to skip half of the square


class Gram:
    """``XᵀX`` ``[in, in]`` in float32 (no factor 2/n: what needs one is indifferent to it), summed over tokens.

    Only panels on and above the diagonal are multiplied, about 60% of the square; ``matrix`` mirrors them.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._mirrored = True
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add tokens ``[..., in]`` of any float dtype; products are taken in float32."""
        tokens = inputs.reshape(-1, inputs.shape[-1]).float()
        for start in range(0, tokens.shape[1], _PANEL):
            panel = tokens[:, start : start + _PANEL]
            self._sum[start : start + _PANEL, start:].addmm_(panel.T, tokens[:, start:])
        self._mirrored = False
        self.tokens += len(tokens)

    @property
    def matrix(self) -> Tensor:
        """The symmetric sum ``[in, in]``. Not a copy."""
        if not self._mirrored:
            for start in range(0, len(self._sum), _PANEL):
                stop = start + _PANEL
                self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
                corner = self._sum[start:stop, start:stop]
                corner.copy_(corner.triu() + corner.triu(1).T)
            self._mirrored = True
        return self._sum


class AbsMean:
    """Mean of ``|x|`` for each input channel, ``[in]`` in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, dtype=torch.float32, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add tokens ``[..., in]``."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        self._sum += tokens.abs().sum(0, dtype=torch.float32)
        self.tokens += len(tokens)

    @property
    def mean(self) -> Tensor:
        """``[in]``; zeros before the first token."""
        return self._sum / max(self.tokens, 1)


class SumSquares:
    """Sum of ``x²`` for each input channel, ``[in]`` in float32: the diagonal of the Gram matrix without the rest."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, dtype=torch.float32, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add tokens ``[..., in]`` of any float dtype; squares are taken in float32."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        self._sum += tokens.float().square().sum(0)
        self.tokens += len(tokens)

    @property
    def total(self) -> Tensor:
        """The sum, ``[in]``."""
        return self._sum

    @property
    def norm(self) -> Tensor:
        """Root of the mean square, ``[in]``; zeros before the first token."""
        return (self._sum / max(self.tokens, 1)).sqrt()


class ChannelRange:
    """Smallest and largest value of each input channel, ``lo`` and ``hi`` ``[in]`` in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.lo = torch.full((columns,), torch.inf, dtype=torch.float32, device=device)
        self.hi = -self.lo
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add tokens ``[..., in]``."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        self.lo = torch.minimum(self.lo, tokens.amin(0).float())
        self.hi = torch.maximum(self.hi, tokens.amax(0).float())
        self.tokens += len(tokens)


class SequenceRange:
    """Smallest and largest value of each input channel in each sequence: what a moving average is taken of."""

    def __init__(self) -> None:
        self._lo: list[Tensor] = []
        self._hi: list[Tensor] = []
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add ``[sequences, tokens, in]``, or ``[tokens, in]`` of one sequence."""
        sequences = inputs if inputs.dim() == 3 else inputs[None]
        self._lo.append(sequences.amin(1).float().cpu())
        self._hi.append(sequences.amax(1).float().cpu())
        self.tokens += sequences.shape[0] * sequences.shape[1]

    @property
    def lo(self) -> Tensor:
        """``[sequences, in]`` float32, on the CPU."""
        return torch.cat(self._lo)

    @property
    def hi(self) -> Tensor:
        """``[sequences, in]`` float32, on the CPU."""
        return torch.cat(self._hi)


class AbsMax:
    """Largest magnitude of each input channel, ``max`` ``[in]`` in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.max = torch.zeros(columns, dtype=torch.float32, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add tokens ``[..., in]``."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        self.max = torch.maximum(self.max, tokens.abs().amax(0).float())
        self.tokens += len(tokens)


class Tokens:
    """The tokens themselves, ``[tokens, in]`` in pieces, each a batch's; whoever asks sees to it that they are few."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add tokens ``[..., in]``."""
        self.pieces.append(inputs.detach().reshape(-1, inputs.shape[-1]).clone())
        self.tokens += len(self.pieces[-1])


def relative_error(original: Tensor, changed: Tensor, gram: Tensor | None) -> float:
    """``|(W - W')X|² / |WX|²`` from the Gram matrix of the inputs; without one, the same of the weights alone."""
    if gram is None:
        return squared_norm(changed, original) / max(squared_norm(original), 1e-30)
    delta, reference = changed.float() - original.float(), original.float()
    return float(((delta @ gram) * delta).sum() / ((reference @ gram) * reference).sum().clamp(min=1e-30))


def rounding_error(original: Tensor, quantized: QWeight) -> float:
    """``relative_error`` without a Gram matrix; the rounded weight is never there as a whole."""
    noise = sum(squared_norm(part.float(), original[rows]) for rows, part in quantized.dense_strips())
    return noise / max(squared_norm(original), 1e-30)


@dataclass(frozen=True)
class Statistics:
    """What was accumulated over the calibration tokens that a subset reads; None where nobody asked."""

    gram: Gram | None = None
    abs_mean: AbsMean | None = None
    abs_max: AbsMax | None = None
    channel_range: ChannelRange | None = None
    sum_squares: SumSquares | None = None
    sequence_range: SequenceRange | None = None
    ranges: Accumulator | None = None
    sample: Tokens | None = None

    def update(self, inputs: Tensor) -> None:
        """Add tokens ``[..., in]``."""
        for statistic in (*self._of_channels(), self.ranges, self.sample):
            if statistic is not None:
                statistic.update(inputs)

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        return max((statistic.tokens for statistic in self._of_channels() if statistic is not None), default=0)

    def _of_channels(self) -> tuple[Gram | AbsMean | AbsMax | ChannelRange | SumSquares | SequenceRange | None, ...]:
        return self.gram, self.abs_mean, self.abs_max, self.channel_range, self.sum_squares, self.sequence_range


@dataclass(frozen=True)
class AttentionRanges:
    """What attention sees of a block, heads side by side: queries, scaled and behind a rotary embedding,
    ``[sequences, query heads * dim]``; keys and values ``[sequences, kv heads * dim]``."""

    query: SequenceRange = field(default_factory=SequenceRange)
    key: SequenceRange = field(default_factory=SequenceRange)
    value: SequenceRange = field(default_factory=SequenceRange)


def new_statistics(
    wanted: Sequence[str] | frozenset[str], columns: int, device: torch.device, act: ActSpec | None = None
) -> Statistics:
    """Empty statistics of the wanted kinds, and of what ``act`` has to know of its inputs."""
    return Statistics(
        gram=Gram(columns, device) if "gram" in wanted else None,
        abs_mean=AbsMean(columns, device) if "abs_mean" in wanted else None,
        sum_squares=SumSquares(columns, device) if "sum_squares" in wanted else None,
        ranges=None if act is None or act.observer is None else act.observer.accumulator(act.grid),
        sample=Tokens() if "sample" in wanted else None,
        sequence_range=SequenceRange() if "sequence_range" in wanted else None,
        abs_max=AbsMax(columns, device) if "abs_max" in wanted else None,
        channel_range=ChannelRange(columns, device) if "channel_range" in wanted else None,
    )
