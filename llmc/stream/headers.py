"""The layout of a safetensors checkpoint: which tensor lies where, read from the headers alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmc.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_LONGEST_HEADER = 100_000_000  # the format's own limit, in bytes
_FETCH = "fetch the file again; it is damaged or not a safetensors file"

# name in the header -> (torch dtype, bits of one header element)
_DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "BOOL": (torch.bool, 8),
    "U8": (torch.uint8, 8),
    "I8": (torch.int8, 8),
    "U16": (torch.uint16, 16),
    "I16": (torch.int16, 16),
    "U32": (torch.uint32, 32),
    "I32": (torch.int32, 32),
    "U64": (torch.uint64, 64),
    "I64": (torch.int64, 64),
    "F16": (torch.float16, 16),
    "BF16": (torch.bfloat16, 16),
    "F32": (torch.float32, 32),
    "F64": (torch.float64, 64),
    "C64": (torch.complex64, 64),
    "F8_E4M3": (torch.float8_e4m3fn, 8),
    "F8_E4M3FNUZ": (torch.float8_e4m3fnuz, 8),
    "F8_E5M2": (torch.float8_e5m2, 8),
    "F8_E5M2FNUZ": (torch.float8_e5m2fnuz, 8),
    "F8_E8M0": (torch.float8_e8m0fnu, 8),
    "F4": (torch.float4_e2m1fn_x2, 4),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: its name in the checkpoint.
        file: the file that holds it.
        dtype: as torch names it.
        shape: as torch has it. Two F4 values are one torch element, so the last size is half the header's.
        offset: of its first byte, from the start of the file.
        nbytes: its length in bytes.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_headers(folder: Path) -> dict[str, TensorEntry]:
    """Read the layout of a checkpoint without reading a tensor.

    A ``model.safetensors`` is the checkpoint; else ``model.safetensors.index.json`` says which shards are, and a
    tensor that the index doesn't name isn't part of it.

    Args:
        folder: the checkpoint's folder.

    Returns:
        tensor name -> entry, ordered by file and offset.

    Raises:
        CheckpointError: no safetensors, a missing, truncated or overlong file, a header that isn't what the format
            prescribes, a tensor that its shard lacks, or a dtype that torch lacks. The message names the file.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_file_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        there = sorted(file.name for file in folder.glob("*.safetensors"))
        hint = f" (only {', '.join(there)})" if there else ""
        raise CheckpointError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}",
            "give the folder that holds the model's safetensors",
        )
    weight_map = read_index(folder / INDEX_FILE)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(shards)} shards that {INDEX_FILE} names: {', '.join(missing)}",
            "finish the download",
        )
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        found = read_file_header(folder / shard)
        named = {name for name, file in weight_map.items() if file == shard}
        absent = sorted(named - found.keys())
        if absent:
            raise CheckpointError(
                f"{folder / shard} lacks {len(absent)} tensors that {INDEX_FILE} places there, the first: {absent[0]}",
                "the index and the shards are of different checkpoints; fetch both again",
            )
        entries.update((name, entry) for name, entry in found.items() if name in named)
    return entries


def read_file_header(file: Path) -> dict[str, TensorEntry]:
    """Read the layout of one safetensors file.

    Args:
        file: the file.

    Returns:
        tensor name -> entry, ordered by offset.

    Raises:
        CheckpointError: see `read_headers`.
    """
    header, start, size = _read_header(file)
    entries = [_entry(name, value, file, start) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    position = start
    for entry in entries:
        if entry.offset != position:
            fault = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"{file}: {entry.name} {fault} (starts at byte {entry.offset}, expected {position})", _FETCH
            )
        position += entry.nbytes
    if size != position:
        fault = "shorter" if size < position else "longer"
        cut = next((f"; it ends within {entry.name}" for entry in entries if entry.offset + entry.nbytes > size), "")
        raise CheckpointError(
            f"{file} is {fault} than its header says: {size} bytes, expected {position}{cut}",
            "fetch the file again; the download may have been cut off",
        )
    return {entry.name: entry for entry in entries}


def headers_digest(entries: Mapping[str, TensorEntry]) -> str:
    """Fingerprint a checkpoint without reading its tensors.

    Args:
        entries: what `read_headers` returned.

    Returns:
        sha256, in hex, over every tensor's name, dtype, shape, place and file name, and the files' sizes. The folder
        is no part of it: a moved checkpoint keeps its digest.
    """
    rows: list[list[Any]] = [
        [entry.name, str(entry.dtype), list(entry.shape), entry.offset, entry.nbytes, entry.file.name]
        for _, entry in sorted(entries.items())
    ]
    sizes = {file.name: file.stat().st_size for file in {entry.file for entry in entries.values()}}
    return hashlib.sha256(json.dumps([rows, sizes], sort_keys=True).encode()).hexdigest()


def read_index(file: Path) -> dict[str, str]:
    """The file of each tensor by ``model.safetensors.index.json``.

    Raises:
        CheckpointError: it isn't JSON, or places a tensor in something that isn't a file name.
    """
    try:
        index = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} isn't JSON: {error}", "fetch the file again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file} has no weight_map", "fetch the file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{file} places {name} in {shard!r}, which isn't a file name", "mend the index")
    return weight_map


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """Return the parsed header, the offset of the first tensor byte, and the file's size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or (length <= _LONGEST_HEADER and size < 8 + length):
            expected = f"at least {8 + length}" if size >= 8 else "at least 8"
            raise CheckpointError(
                f"{file} ends within its header: {size} bytes, expected {expected}",
                "fetch the file again; the download may have been cut off",
            )
        if length > _LONGEST_HEADER:
            raise CheckpointError(
                f"{file} claims a header of {length} bytes, more than the {_LONGEST_HEADER} allowed", _FETCH
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"the header of {file} isn't JSON: {error}", _FETCH) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} is {type(header).__name__}, not an object", _FETCH)
    return header, 8 + length, size


def _entry(name: str, value: Any, file: Path, start: int) -> TensorEntry:
    try:
        dtype_name, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header's entry of {name} lacks dtype, shape or offsets", _FETCH) from error
    numbers = [*shape, begin, end] if isinstance(shape, list) else [-1]
    if any(not isinstance(number, int) or isinstance(number, bool) or number < 0 for number in numbers):
        raise CheckpointError(f"{file}: {name} has the shape {shape} and the offsets {begin}, {end}", _FETCH)
    if dtype_name not in _DTYPES:
        raise CheckpointError(
            f"{file}: {name} is of dtype {dtype_name}, which isn't supported",
            f"convert it to one of {', '.join(_DTYPES)}",
        )
    dtype, bits = _DTYPES[dtype_name]
    if end - begin != (math.prod(shape) * bits + 7) // 8:
        raise CheckpointError(
            f"{file}: {name}, {dtype_name} of shape {shape}, can't be {end - begin} bytes long", _FETCH
        )
    if bits == 4:
        if not shape or shape[-1] % 2:
            raise CheckpointError(f"{file}: {name}, F4 of shape {shape}, doesn't fill whole bytes", "pad it")
        shape = [*shape[:-1], shape[-1] // 2]
    return TensorEntry(name, file, dtype, tuple(shape), start + begin, end - begin)
