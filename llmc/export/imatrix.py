"""llama.cpp's importance matrix: the squares of every Linear's inputs on the calibration text, in a GGUF file.

``llama-quantize --imatrix`` weighs its rounding errors with them. The file is that of ``tools/imatrix``: by llama.cpp's
names of the weights, the sum of squares of each input channel and the count of tokens; of experts a row each.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ExportError
from ..quant import InputSquares, PerCluster, UnitRecord
from .base import Exporter, Layer, Source

_SUM, _COUNT = "in_sum2", "counts"


class Imatrix(Exporter):
    """For a plain model that llama.cpp is to quantize by itself: ``save_trans`` of the same run, say."""

    name = "save_imatrix"
    folder = "imatrix"
    assembled = "imatrix.gguf"
    stores_weights = False
    stores_codes = False
    wants_squares = True
    mixes_schemes = True

    def check(self, layers: list[Layer]) -> list[str]:
        """Any scheme: it's about the model before it's rounded."""
        if find_spec("gguf") is None:
            raise ExportError("save_imatrix needs the package gguf", 'install it: pip install "llmc[gguf]"')
        if any(layer.spec is not None and isinstance(layer.spec.granularity, PerCluster) for layer in layers):
            raise ExportError(
                "save_imatrix is about channels in the original's order, which RPTQ changes",
                "leave out save_imatrix, or quantize with another method",
            )
        return []

    def check_source(self, source: Source) -> list[str]:
        """llama.cpp's name of every Linear is known."""
        from .gguf_models import architecture_of

        architecture_of(source.config)
        return []

    def nbytes(self, layer: Layer) -> int:
        """A number for each input channel, and a count."""
        return 4 * (layer.columns + 1)

    def tensors(self, unit: UnitRecord) -> dict[str, Tensor]:
        """``in_sum2`` float32 ``[1, in]`` and ``counts`` float32 ``[1, 1]`` of each Linear."""
        stored = {}
        for name, one in unit.squares.items():
            stored[f"{name}.{_SUM}"] = one.total[None].clone()  # q, k and v share theirs
            stored[f"{name}.{_COUNT}"] = torch.full((1, 1), float(one.tokens))
        return stored

    def read(self, tensors: dict[str, Tensor]) -> UnitRecord:
        """The squares; there are no weights."""
        names = [name.removesuffix(f".{_SUM}") for name in tensors if name.endswith(f".{_SUM}")]
        return UnitRecord(
            squares={
                name: InputSquares(tensors[f"{name}.{_SUM}"][0], int(tensors[f"{name}.{_COUNT}"])) for name in names
            }
        )

    def assemble(self, parts: Sequence[Path], source: Source, target: Path) -> int:
        """The file."""
        import gguf

        from .gguf_file import tensor_name
        from .gguf_models import architecture_of, place_of

        found, blocks = architecture_of(source.config), int(source.config["num_hidden_layers"])
        writer = gguf.GGUFWriter(target, found.name)
        writer.add_type(gguf.GGUFType.IMATRIX)
        count, tokens = 0, 0
        for part in parts:
            stacked: dict[str, dict[int, Tensor]] = {}  # experts are rows of one tensor
            for key, tensor in sorted(load_file(part).items()):
                module, _, last = key.rpartition(".")
                name, expert = (
                    tensor_name(found, blocks, f"{module}.weight"),
                    place_of(found, f"{module}.weight").expert,
                )
                stacked.setdefault(f"{name}.{last}", {})[expert or 0] = tensor
                tokens = max(tokens, int(tensor)) if last == _COUNT else tokens
            for name, rows in stacked.items():
                writer.add_tensor(name, torch.cat([rows[expert] for expert in sorted(rows)]).numpy())
                count += 1
        writer.add_array("imatrix.datasets", ["calibration text"])
        writer.add_uint32("imatrix.chunk_count", 1)
        writer.add_uint32("imatrix.chunk_size", tokens)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return count

    def serve(self, folder: Path) -> str:
        """Who reads it."""
        return f"llama-quantize --imatrix {folder / self.assembled} MODEL-F16.gguf MODEL-Q4_K_M.gguf Q4_K_M"
