"""GGUF files: whole, all blocks alike, and a tokenizer whose special tokens exist. By the ``gguf`` package's reader."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .findings import Report

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_NEEDED = ("token_embd.weight", "output_norm.weight")
_IDS = ("bos", "eos", "unknown", "padding", "eot", "separator")
_SCALED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # their blocks begin with a float16 scale
_ALL_BUT = 3  # a tensor that so many of 4 blocks have belongs to all


@dataclass(frozen=True)
class _Tensor:
    """One entry of the tensor list."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def check_gguf(files: Sequence[Path], report: Report) -> None:
    """Look at a GGUF file, or at all parts of one.

    Raises:
        CheckpointError: the package isn't installed.
    """
    if find_spec("gguf") is None:
        raise CheckpointError("GGUF files are read by the package gguf", 'install it: pip install "llmc[gguf]"')
    tensors: dict[str, _Tensor] = {}
    fields: dict[str, Any] = {}
    for file in files:
        read = _read(file, report)
        if read is None:
            continue
        for tensor in read[1]:
            _check_data(file, tensor, report)
        fields = {**read[0], **fields}
        tensors |= {tensor.name: tensor for tensor in read[1]}
    if fields:
        _check_blocks(files[0], fields, tensors, report)
        _check_tokens(files[0], fields, tensors, report)
    kinds = Counter(tensor.kind for tensor in tensors.values())
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    size = sum(tensor.nbytes for tensor in tensors.values())
    report.checked.append(f"GGUF: {len(files)} files, {len(tensors)} tensors of {size / 1e6:.1f} MB ({told})")


def _read(file: Path, report: Report) -> tuple[dict[str, Any], list[_Tensor]] | None:
    """Metadata and tensor list; None if there is no reading them."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    class Header(GGUFReader):
        """Stops in front of the data, so that a file that ends early still has a list of tensors."""

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            self.listed = []
            for field in fields:
                _, name, _, dims, raw, offset = field.parts
                kind = GGMLQuantizationType(int(raw[0]))
                run, size = GGML_QUANT_SIZES[kind]
                shape = tuple(int(dim) for dim in dims)
                nbytes = prod(shape) // run * size
                self.listed.append(_Tensor(bytes(name).decode(), kind.name, shape, start_offs + int(offset[0]), nbytes))

    try:
        reader = Header(file)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as problem:
        report.found(file, "", f"its header can't be read: {problem}", "fetch or export it again")
        return None
    if len({tensor.name for tensor in reader.listed}) < len(reader.listed):
        report.found(file, "", "names a tensor twice")
    return values, reader.listed


def _check_data(file: Path, tensor: _Tensor, report: Report) -> None:
    """Whether a tensor's bytes are there, and its floats and scales are numbers."""
    size = file.stat().st_size
    if tensor.offset + tensor.nbytes > size:
        missing = f"ends {tensor.offset + tensor.nbytes - size} bytes behind the file's end"
        report.found(file, tensor.name, missing, "fetch or export it again")
        return
    scaled = tensor.kind in _SCALED
    if tensor.kind not in ("F32", "F16") and not scaled:
        return
    data = np.memmap(file, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(tensor.nbytes,))
    values = data.view(np.float32 if tensor.kind == "F32" else np.float16)
    if scaled:
        blocks = prod(tensor.shape) // 32
        values = np.ascontiguousarray(data.reshape(blocks, -1)[:, :2]).view(np.float16)
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        what = "scales" if scaled else "values"
        report.found(file, tensor.name, f"{wrong} of {values.size} {what} are NaN or infinite")


def _check_blocks(file: Path, fields: dict[str, Any], tensors: dict[str, _Tensor], report: Report) -> None:
    """Every block that the metadata counts is there, with the tensors that the others have."""
    for name in _NEEDED:
        if name not in tensors:
            report.found(file, name, "is missing")
    architecture = fields.get("general.architecture")
    count = fields.get(f"{architecture}.block_count")
    if not isinstance(count, int):
        report.found(file, "", f"has no {architecture}.block_count")
        return
    blocks: list[set[str]] = [set() for _ in range(count)]
    for name in tensors:
        found = _BLOCK.fullmatch(name)
        if found is not None and int(found[1]) >= count:
            report.found(file, name, f"is beyond the {count} blocks that {architecture}.block_count counts")
        elif found is not None:
            blocks[int(found[1])].add(found[2])
    for part in sorted(set().union(*blocks)):
        having = [index for index, own in enumerate(blocks) if part in own]
        if 4 * len(having) >= _ALL_BUT * count:
            for index in sorted(set(range(count)) - set(having)):
                report.found(file, f"blk.{index}.{part}", "is missing, and other blocks have it")
    for index, own in enumerate(blocks):
        if not own:
            report.found(file, f"blk.{index}", "is missing")


def _check_tokens(file: Path, fields: dict[str, Any], tensors: dict[str, _Tensor], report: Report) -> None:
    """The vocabulary is as long as the embedding, and special tokens are in it."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        report.found(file, "tokenizer.ggml.tokens", "is missing: there is no vocabulary")
        return
    embedding = tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[-1] != len(tokens):
        report.found(file, "token_embd.weight", f"has {embedding.shape[-1]} rows for {len(tokens)} tokens")
    for key in ("token_type", "scores"):
        values = fields.get(f"tokenizer.ggml.{key}")
        if isinstance(values, list) and len(values) != len(tokens):
            report.found(file, f"tokenizer.ggml.{key}", f"has {len(values)} entries for {len(tokens)} tokens")
    for key in _IDS:
        value = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(value, int) and not 0 <= value < len(tokens):
            report.found(file, f"tokenizer.ggml.{key}_token_id", f"is {value}, and there are {len(tokens)} tokens")
