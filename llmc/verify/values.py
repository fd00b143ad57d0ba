"""The values of a folder: what no model can have, and, beside another folder, what differs from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..stream.source import read_tensor
from .comparison import Comparison
from .findings import Report
from .layouts import DENSE, finite_problems
from .structure import Module, Structure

_READ = "export the folder again; if it comes back, the disk or the calibration is at fault"


def check_values(structure: Structure, report: Report, comparison: Comparison | None) -> None:
    """Read every tensor once, in the order of the files, one module at a time."""
    modules = sorted(structure.modules.values(), key=_place)
    shared: dict[str, dict[str, Tensor]] = {}
    for module in modules:
        tensors = {part: read_tensor(entry) for part, entry in module.parts.items()}
        problems = list(module.layout.problems(tensors, module.shape))
        for part, problem in problems:
            report.found(module.parts[part].file, f"{module.name}.{part}", problem, _READ)
        shared[module.name] = {part: tensors[part] for part in module.layout.shared if part in tensors}
        if comparison is not None and not problems:
            comparison.weight(module, module.layout.dense(tensors))
    for name, entry in structure.plain.items():
        tensor = read_tensor(entry)
        problems = list(finite_problems(name, tensor)) if tensor.is_floating_point() else []
        for _, problem in problems:
            report.found(entry.file, name, problem, _READ)
        if comparison is not None and not problems:
            comparison.plain(name, entry, tensor)
    _check_shared(structure, shared, report)
    quantized = sum(module.layout != DENSE for module in modules)
    report.checked.append(f"values: {quantized} quantized weights and {len(structure.plain)} other tensors are numbers")


def _place(module: Module) -> tuple[str, int]:
    first = min(module.parts.values(), key=lambda entry: (entry.file.name, entry.offset))
    return first.file.name, first.offset


def _check_shared(structure: Structure, shared: Mapping[str, Mapping[str, Tensor]], report: Report) -> None:
    """Linears that run as one have one scale of their input; a backend keeps but one of several."""
    for modules in structure.fused:
        for module in modules[1:]:
            if ".experts." in module.name:
                continue  # one input each
            for part, value in shared[module.name].items():
                first = shared[modules[0].name].get(part)
                if first is not None and not torch.equal(first.reshape(-1), value.reshape(-1)):
                    report.found(
                        module.parts[part].file,
                        f"{module.name}.{part}",
                        f"is {float(value.reshape(-1)[0]):.6g}, that of {modules[0].name} "
                        f"{float(first.reshape(-1)[0]):.6g}; backends run both as one, with one of them",
                        "calibrate them together, and export the folder again",
                    )
