"""A loaded block's parameters, by the names and in the dtypes that the checkpoint has for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..quant import UnitRecord


@dataclass
class StoredBlock:
    """Goes between a module and the records that sinks write and read back.

    Attributes:
        block: the module.
        prefix: its name in the model.
        stored: for each of its parameters, by the model's name, the checkpoint's name and dtype.
        gathered: the order in memory of a weight's columns, by the Linear's name in the block, where the checkpoint has
            another.
    """

    block: nn.Module
    prefix: str
    stored: Mapping[str, tuple[str, torch.dtype]]
    gathered: Mapping[str, Tensor] = field(default_factory=dict)

    def parameters(self) -> list[tuple[str, Tensor]]:
        """Those that the checkpoint has, by their names in the block, and the buffers that it has."""
        every = (*self.block.named_parameters(), *self.block.named_buffers())
        return [pair for pair in every if f"{self.prefix}.{pair[0]}" in self.stored]

    def dtype(self, name: str) -> torch.dtype:
        """In which a parameter is stored."""
        return self.stored[f"{self.prefix}.{name}"][1]

    def module(self, name: str) -> str:
        """The checkpoint's name of a Linear."""
        return self._name(f"{name}.weight").removesuffix(".weight")

    def plain(self, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
        """All parameters as they are to be stored, but the weights of the Linears ``leave_out``."""
        found = {}
        for name, parameter in self.parameters():
            owner, _, kind = name.rpartition(".")
            if kind == "weight" and owner in leave_out:
                continue
            order = self._order(name)
            data = parameter.data if order is None else parameter.data[:, order.argsort()]
            found[self._name(name)] = data.to(self.dtype(name)).cpu()
        return found

    def set(self, record: UnitRecord) -> None:
        """Give the block the weights of a record that was read back."""
        dense = {f"{name}.weight": weight.dequantize() for name, weight in record.quantized.items()}
        for name, parameter in self.parameters():
            stored = self._name(name)
            tensor, order = dense[stored] if stored in dense else record.plain[stored], self._order(name)
            parameter.data.copy_(tensor if order is None else tensor[:, order])

    @contextmanager
    def holding(self, record: UnitRecord) -> Iterator[None]:
        """Within the context the block has a record's weights."""
        kept = [(parameter, parameter.data) for _, parameter in self.parameters()]
        try:
            for parameter, data in kept:
                parameter.data = torch.empty_like(data)
            self.set(record)
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    def _name(self, parameter: str) -> str:
        return self.stored[f"{self.prefix}.{parameter}"][0]

    def _order(self, parameter: str) -> Tensor | None:
        owner, _, kind = parameter.rpartition(".")
        return self.gathered.get(owner) if kind == "weight" else None
