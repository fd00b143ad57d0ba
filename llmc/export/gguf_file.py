"""A GGUF file out of the units' shards, one tensor in memory at a time. Imported only where the gguf package is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import ExportError
from .base import Source
from .gguf_blocks import BY_NAME, ZERO
from .gguf_models import (
    Architecture,
    architecture_of,
    fields_of,
    needs_float32,
    place_of,
    rope_divisors,
    rope_fields,
    turned_rows,
)
from .gguf_tokenizer import Vocabulary, read_vocabulary

_PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FILE_TYPES = {"Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M", "F32": "ALL_F32"}
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Piece:
    """A stored tensor: where it lies, and what is done to it on its way."""

    part: Path
    key: str
    original: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: one stored tensor, or those of all experts in their order."""

    name: str
    kind: str
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy would have it: rows of bytes where they are packed."""
        (first, *others) = self.pieces
        return (1 + len(others), *first.shape) if others else first.shape


def write_gguf(parts: Sequence[Path], source: Source, target: Path) -> int:
    """Write the whole file; returns the number of its tensors.

    Raises:
        ExportError: a tensor has no place in llama.cpp's model.
    """
    found = architecture_of(source.config)
    extra = rope_divisors(source.config)
    entries = list(_entries(parts, found, int(source.config["num_hidden_layers"])))
    writer = gguf.GGUFWriter(target, found.name)
    _write_metadata(writer, source, found, entries)
    for name, tensor in extra.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        nbytes = sum(piece.nbytes for piece in entry.pieces)
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.uint8), nbytes, raw_dtype=kind)
    total, shared, expert, experts = writer.get_total_parameter_count()
    writer.add_size_label(gguf.size_label(total, shared, expert, experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in extra.values():
        writer.write_tensor_data(tensor.numpy())
    for entry in entries:
        writer.write_tensor_data(_content(entry, found, source.config))
    writer.close()
    return len(extra) + len(entries)


# --- tensors ---------------------------------------------------------------------------------------------------------


def tensor_name(found: Architecture, blocks: int, name: str) -> str | None:
    """llama.cpp's name of a tensor; None if its model has no such tensor."""
    arch = next(one for one, text in gguf.MODEL_ARCH_NAMES.items() if text == found.name)
    known = gguf.get_tensor_name_map(arch, blocks)
    return known.get_name(place_of(found, name).name, try_suffixes=_SUFFIXES)


def _entries(parts: Sequence[Path], found: Architecture, blocks: int) -> Iterator[Entry]:
    """All tensors in the order of the units, by their names within one."""
    for part in parts:
        grouped: dict[str, dict[int, Piece]] = {}
        for piece in _pieces(part, found):
            name = tensor_name(found, blocks, piece.original)
            if name is None:
                raise ExportError(f"{part}: llama.cpp's {found.name} has no tensor for {piece.original}", "report this")
            grouped.setdefault(name, {})[place_of(found, piece.original).expert or 0] = piece
        for name, pieces in grouped.items():
            ordered = tuple(pieces[index] for index in sorted(pieces))
            if len({(piece.kind, piece.shape) for piece in ordered}) > 1:
                raise ExportError(
                    f"{name}: llama.cpp stores all experts of a block as one, and theirs have different types",
                    "give them one scheme (quant.mix_bits, ignored_layers)",
                )
            yield Entry(name, ordered[0].kind, ordered)


def _pieces(part: Path, found: Architecture) -> Iterator[Piece]:
    with safe_open(part, framework="pt") as shard:
        for key in sorted(shard.keys()):
            module, _, last = key.rpartition(".")
            if last == ZERO:
                continue
            view = shard.get_slice(key)
            shape, dtype = tuple(view.get_shape()), str(view.get_dtype())
            packed = last in BY_NAME
            original = f"{module}.weight" if packed else key
            kind = last if packed else "F32" if needs_float32(found, key, shape) else dtype
            wide = shape if packed else (*shape[:-1], shape[-1] * _PLAIN[kind].itemsize)
            yield Piece(part, key, original, kind, wide, int(np.prod(wide, dtype=np.int64)))


def _content(entry: Entry, found: Architecture, config: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    tensors = [_load(piece, found, config) for piece in entry.pieces]
    return np.concatenate(tensors) if len(tensors) > 1 else tensors[0]


def _load(piece: Piece, found: Architecture, config: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The bytes of a tensor, uint8, as the file has them."""
    with safe_open(piece.part, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(piece.key)
    if piece.kind in _PLAIN:
        tensor = tensor.to(_PLAIN[piece.kind])
        if found.norm_shift and piece.original.endswith("norm.weight"):
            tensor = tensor + found.norm_shift
    rows = turned_rows(found, piece.original, config)
    if rows is not None:
        tensor = tensor[rows]
    return tensor.contiguous().view(torch.uint8).numpy()


# --- metadata --------------------------------------------------------------------------------------------------------


def _write_metadata(writer: gguf.GGUFWriter, source: Source, found: Architecture, entries: Sequence[Entry]) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_model_name(source.folder))
    writer.add_file_type(_file_type(entries))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in (fields_of(source.config) | rope_fields(source.config)).items():
        named = f"{found.name}.{key}"
        if isinstance(value, str):
            writer.add_string(named, value)
        elif isinstance(value, float):
            writer.add_float32(named, value)
        else:
            writer.add_uint32(named, value)
    _write_tokenizer(writer, source, read_vocabulary(source.folder, int(source.config["vocab_size"])))


def _model_name(folder: Path) -> str:
    """The folder's name, or that of the repository whose snapshot it is."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.resolve().name


def _file_type(entries: Sequence[Entry]) -> int:
    """The type of most matrices' bytes, quantized ones first: what llama.cpp shows."""
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.kind] = sizes.get(entry.kind, 0) + sum(piece.nbytes for piece in entry.pieces)
    quantized = {kind: size for kind, size in sizes.items() if kind in BY_NAME}
    sizes = quantized or sizes
    kind = max(sizes, key=lambda one: (sizes[one], one))
    return int(gguf.LlamaFileType[_FILE_TYPES.get(kind, f"MOSTLY_{kind}")])


def _write_tokenizer(writer: gguf.GGUFWriter, source: Source, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    byte_level = vocabulary.scores is None
    special = gguf.SpecialVocab(source.folder, load_merges=byte_level, n_vocab=len(vocabulary.tokens))
    if byte_level:  # else llama.cpp goes by the pre-tokenizer's habits
        special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)
