"""How a family's own checkpoints hold the weights of its Linears, where that isn't ``[out, in]`` one by one.

GPT-2 stores them transposed. Some mixtures of experts store one tensor for the matrices of all experts of a block:
``gate_up_proj`` ``[experts, in, 2 * inner]`` with its two halves side by side or interleaved, ``down_proj``
``[experts, inner, out]``, and their biases. Everything here is a view or a stack: no value changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<of>gate_up|down)_proj(?P<bias>_bias)?")
_SINGLE = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<of>gate|up|down)_proj\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class FusedExperts:
    """One tensor for a matrix of all experts.

    Attributes:
        interleaved: gate and up take turns along the outputs; otherwise all of gate stands before all of up.
        transposed: each matrix is stored ``[in, out]``.
    """

    interleaved: bool = False
    transposed: bool = True

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """Views ``[out, in]`` (biases ``[out]``) of a fused tensor by the names of the experts' Linears; None for any
        other tensor.

        Args:
            name: the checkpoint's.
            tensor: ``[experts, in, out]``, or ``[experts, out, in]`` if not transposed; biases ``[experts, out]``.
        """
        found = _FUSED.fullmatch(name)
        if found is None or tensor.ndim != (2 if found["bias"] else 3):
            return None
        kind = "bias" if found["bias"] else "weight"
        by_row = tensor.transpose(1, 2) if kind == "weight" and self.transposed else tensor
        parts = {"down": by_row} if found["of"] == "down" else self._halves(by_row)
        return {
            f"{found['experts']}.{index}.{of}_proj.{kind}": part[index]
            for index in range(len(tensor))
            for of, part in parts.items()
        }

    def join(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse, for whole blocks; other tensors stay as they are.

        Raises:
            ValueError: a tensor of some expert is missing.
        """
        joined: dict[str, Tensor] = {}
        groups: dict[str, dict[tuple[str, int], Tensor]] = {}
        for name, tensor in tensors.items():
            found = _SINGLE.fullmatch(name)
            if found is None:
                joined[name] = tensor
            else:
                groups.setdefault(self.holder(name), {})[found["of"], int(found["index"])] = tensor
        for name, group in groups.items():
            parts = {of: _stack(name, of, group) for of in dict.fromkeys(of for of, _ in group)}
            if parts.keys() not in ({"down"}, {"gate", "up"}):
                raise ValueError(f"{name}: only {', '.join(parts)} of it is there")
            by_row = parts["down"] if "down" in parts else self._whole(parts["gate"], parts["up"])
            turned = by_row.ndim == 3 and self.transposed
            joined[name] = (by_row.transpose(1, 2) if turned else by_row).contiguous()
        return joined

    def holder(self, name: str) -> str:
        """The fused tensor in which a tensor of an expert's Linear lies; any other name as it is."""
        found = _SINGLE.fullmatch(name)
        if found is None:
            return name
        fused = "down_proj" if found["of"] == "down" else "gate_up_proj"
        return f"{found['experts']}.{fused}{'_bias' if found['kind'] == 'bias' else ''}"

    def transposes(self, name: str) -> bool:
        """Single Linears aren't in such checkpoints, so nobody expects them transposed."""
        return False

    def _halves(self, rows: Tensor) -> dict[str, Tensor]:
        """Gate and up of ``[experts, 2 * inner, ..]``."""
        if self.interleaved:
            return {"gate": rows[:, 0::2], "up": rows[:, 1::2]}
        inner = rows.shape[1] // 2
        return {"gate": rows[:, :inner], "up": rows[:, inner:]}

    def _whole(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.stack((gate, up), dim=2).flatten(1, 2) if self.interleaved else torch.cat((gate, up), dim=1)


def _stack(name: str, of: str, group: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """One matrix of all experts in order."""
    found = {index: tensor for (part, index), tensor in group.items() if part == of}
    if sorted(found) != list(range(len(found))):
        raise ValueError(f"{name}: an expert in front of {max(found)} has no {of}_proj")
    return torch.stack([found[index] for index in range(len(found))])


@dataclass(frozen=True)
class Transposed:
    """Linears that are stored ``[in, out]`` under their usual names.

    Attributes:
        modules: the last parts of their names.
    """

    modules: frozenset[str]

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """The view ``[out, in]`` of a transposed weight; None for any other tensor."""
        return {name: tensor.T} if self._covers(name, tensor) else None

    def join(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse."""
        return {
            name: tensor.T.contiguous() if self._covers(name, tensor) else tensor for name, tensor in tensors.items()
        }

    def holder(self, name: str) -> str:
        """Names don't change."""
        return name

    def transposes(self, name: str) -> bool:
        """By the last part of the module's name."""
        return name.rpartition(".")[2] in self.modules

    def _covers(self, name: str, tensor: Tensor) -> bool:
        module, _, kind = name.rpartition(".")
        return kind == "weight" and tensor.ndim == 2 and self.transposes(module)


StoredLayout = FusedExperts | Transposed

_LAYOUTS: dict[str, StoredLayout] = {
    "gpt2": Transposed(frozenset({"c_attn", "q_attn", "c_fc", "c_proj"})),
    "gpt_oss": FusedExperts(interleaved=True),
    "llama4": FusedExperts(),
    "llama4_text": FusedExperts(),
    "qwen3_vl_moe": FusedExperts(),
    "qwen3_vl_moe_text": FusedExperts(),
}


def layout_of(model_type: str) -> StoredLayout | None:
    """The layout of an architecture's own checkpoints (``model_type`` of ``config.json``); None: Linears one by one."""
    return _LAYOUTS.get(model_type)
