"""Rotations that vLLM runs in front of a Linear, as the ``transform_config`` of compressed-tensors describes them.

Rules are those of vLLM 0.32: a transform of type ``hadamard`` in front of a Linear is a kernel for Sylvester's matrix
of a power of two, of all input channels or of runs of ``head_dim``; the Linear has no bias, and its model one device.
The kernel needs no weight, so that none is stored. Rotations of queries and keys are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme

from ..errors import ExportError
from ..quant import KvSpec
from .base import Layer

_NAME = "R4"


def check_rotations(layers: Sequence[Layer], kv: KvSpec | None) -> list[str]:
    """Refuse rotations that vLLM doesn't run.

    Args:
        layers: of all blocks.
        kv: how the KV cache is quantized; its keys are rotated wherever inputs are.

    Returns:
        Warnings: what else must be so.

    Raises:
        ExportError: names the layer, and what can be done.
    """
    rotated = [layer for layer in layers if layer.rotated is not None]
    if not rotated:
        return []
    offline = "set online_rotate: False"
    if kv is not None:
        raise ExportError(
            "quant.special: online_rotate: True with quant.kvcache: the scales of the KV cache are those of rotated "
            "keys, and vLLM doesn't rotate keys (save_vllm)",
            f"{offline}, or remove quant.kvcache",
        )
    for layer in rotated:
        order = layer.rotated or 0
        if order & (order - 1):
            raise ExportError(
                f"{layer.name}: vLLM's kernel rotates by Hadamard matrices of powers of two, not of {order} "
                "(quant.special: online_rotate: True with save_vllm)",
                f"set online_blocks: True, which rotates blocks of {order & -order} channels; or {offline}",
            )
        if layer.biased:
            raise ExportError(
                f"{layer.name}: vLLM doesn't rotate the input of a Linear with a bias "
                "(quant.special: online_rotate: True with save_vllm)",
                offline,
            )
    return [
        "save_vllm: online_rotate: True runs in vLLM on one GPU (--tensor-parallel-size 1); Transformers, SGLang and "
        "others load the folder without a word and don't rotate: their output is wrong"
    ]


def transforms(layers: Sequence[Layer]) -> dict[str, Any]:
    """The entry of ``quantization_config``; none where nothing is rotated."""
    rotated = [layer for layer in layers if layer.rotated is not None]
    if not rotated:
        return {}
    order, columns = rotated[0].rotated, rotated[0].columns
    names = [layer.name for layer in rotated]
    # The weights hold the inverse already; that is said for readers that want to know what was done to them.
    places = [
        TransformArgs(targets=names, location=place, inverse=inverse)
        for place, inverse in (("input", False), ("weight_input", True))
    ]
    scheme = TransformScheme(type="hadamard", apply=places, head_dim=None if order == columns else order)
    return {"transform_config": TransformConfig(config_groups={_NAME: scheme}).model_dump(mode="json")}
