"""What the core hands to an exporter for one unit of the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .activations import InputRange
from .qweight import QWeight


@dataclass(frozen=True)
class InputSquares:
    """How large a Linear's input channels are on the calibration text.

    Attributes:
        total: float32 ``[in]``, the sum of their squares over all tokens.
        tokens: how many there were.
    """

    total: Tensor
    tokens: int


@dataclass(frozen=True)
class UnitRecord:
    """One unit (the embedding, a block, the head) as it is to be stored.

    Attributes:
        plain: tensors under the checkpoint's own names, in their stored dtype.
        quantized: quantized weights by the checkpoint's name of their module (``model.layers.0.mlp.down_proj``).
        inputs: calibrated ranges of the inputs of such modules, by the same names; empty where scales are dynamic. An
            exporter stores what follows from them, and doesn't read them back.
        cache: scales of a static KV cache, float32 ``[1]``, by name (``model.layers.0.self_attn.k_scale``). They lie
            beside the weights: only formats whose backend quantizes the cache store them.
        squares: of the transformed model's Linears, by the checkpoint's names, where a format asks for them.
    """

    plain: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, QWeight] = field(default_factory=dict)
    inputs: dict[str, InputRange] = field(default_factory=dict)
    cache: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, InputSquares] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of the model's weights in it, quantized or not; scales are none."""
        plain = sum(tensor.numel() for tensor in self.plain.values())
        return plain + sum(weight.codes.numel() for weight in self.quantized.values())
