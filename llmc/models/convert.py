"""Conversions to a folder of safetensors, made once and kept: from pytorch_model*.bin and from GGUF."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmc.errors import CheckpointError

BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

SIDE_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".spm")
"""Files beside the weights that a checkpoint needs: configuration, tokenizer, chat template, code."""


def cache_root(cache: Path | None = None) -> Path:
    """Return where conversions are kept: `cache`, else the variable LLMC_CACHE, else ``~/.cache/llmc``."""
    return cache or Path(os.environ.get("LLMC_CACHE") or "~/.cache/llmc").expanduser()


def convert_bin(folder: Path, cache: Path | None = None) -> Path:
    """Convert pytorch_model*.bin to safetensors, one shard in memory at a time.

    Args:
        folder: holds config.json and pytorch_model.bin, or its shards and their index.
        cache: where to keep the result, in ``converted/``; see `cache_root`.

    Returns:
        A folder with the same tensors as safetensors and a byte-for-byte copy of every side file. An alias of a
        vocabulary-sized tensor is left out where the config ties the embeddings; any other is written out.

    Raises:
        CheckpointError: a missing or damaged shard, or a file with more in it than tensors: arbitrary objects are
            never unpickled.
    """
    weight_map = _bin_index(folder)
    shards = sorted(set(weight_map.values())) if weight_map else [BIN_SINGLE]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(shards)} shards that {BIN_INDEX} names: {', '.join(missing)}",
            "finish the download",
        )
    sides = _side_files(folder)

    def write(target: Path) -> None:
        tied_rows = _tied_rows(folder / "config.json")
        placed: dict[str, str] = {}
        total = 0
        for shard in shards:
            tensors = _load_bin(folder / shard)
            if weight_map:
                named = {name for name, file in weight_map.items() if file == shard}
                absent = sorted(named - tensors.keys())
                if absent:
                    raise CheckpointError(
                        f"{folder / shard} lacks {absent[0]}, which {BIN_INDEX} places there", "fetch both again"
                    )
                tensors = {name: tensor for name, tensor in tensors.items() if name in named}
            tensors = _own_memory(tensors, tied_rows)
            name = shard.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
            save_file(tensors, target / name, metadata={"format": "pt"})
            placed.update(dict.fromkeys(tensors, name))
            total += sum(tensor.nbytes for tensor in tensors.values())
        if weight_map:
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for side in sides:
            (target / side.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(side, target / side.relative_to(folder))

    sources = [*(folder / shard for shard in shards), *sides]
    return _convert_once(folder.resolve().name, sources, "bin", cache, write)


def convert_gguf(file: Path, cache: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Convert a GGUF file to a folder with config, tokenizer and safetensors.

    The weights are dequantized in float32 and then rounded to `dtype`; the whole model is in memory meanwhile.

    Args:
        file: the .gguf file.
        cache: where to keep the result, in ``converted/``; see `cache_root`.
        dtype: of the tensors written.

    Raises:
        CheckpointError: not a GGUF, or one that transformers can't read.
    """

    def write(target: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        if find_spec("gguf") is None:
            raise CheckpointError(f"reading {file} needs the package gguf", 'install it: pip install "llmc[gguf]"')
        try:
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
                packed = AutoModelForCausalLM.from_pretrained(
                    file.parent,
                    gguf_file=file.name,
                    dtype=torch.float32,
                    quantization_config=GgufConfig(dequantize=True),
                )
        except Exception as error:  # the reader raises whatever a broken or unknown file makes it trip over
            raise CheckpointError(
                f"can't read {file} as GGUF: {type(error).__name__}: {error}",
                "check the file; an architecture that transformers doesn't know as GGUF can't be converted",
            ) from error
        with _quiet():
            _plain(packed, dtype).save_pretrained(target, max_shard_size="4GB")
            tokenizer.save_pretrained(target)

    return _convert_once(file.stem, [file], str(dtype), cache, write)


def _plain(packed: Any, dtype: torch.dtype) -> Any:
    """Move the weights into an ordinary model of the same class, which has forgotten that it was quantized."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # from_config has no annotations
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    weights = {name: tensor.to(dtype) for name, tensor in packed.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    if packed.generation_config is not None:
        model.generation_config = packed.generation_config
    return model


def _convert_once(
    name: str, sources: Sequence[Path], variant: str, cache: Path | None, write: Callable[[Path], None]
) -> Path:
    """Run a conversion unless its result is there; the result appears whole or not at all.

    Args:
        name: of the checkpoint; the folder's name starts with it.
        sources: the files converted. Their names, sizes and times of change name the result.
        variant: what else the result depends on.
        cache: see `cache_root`.
        write: fills the folder that it is given.
    """
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(sources)]
    digest = hashlib.sha256(json.dumps([variant, stats]).encode()).hexdigest()[:12]
    target = cache_root(cache) / "converted" / f"{name}-{digest}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with _lock(target.with_name(f".{target.name}.lock")):
        if target.is_dir():  # another process made it while this one waited
            return target
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir()
        try:
            write(partial)
            for path in [*(file for file in partial.rglob("*")), partial]:
                _sync(path)
            partial.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _bin_index(folder: Path) -> dict[str, str]:
    """Return tensor name -> shard; empty for a single file."""
    index = folder / BIN_INDEX
    if (folder / BIN_SINGLE).is_file() or not index.is_file():
        return {}
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = {str(name): Path(shard).name for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} isn't an index of shards: {error}", "fetch the file again") from error
    return shards


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        try:
            loaded = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            loaded = torch.load(file, weights_only=True, map_location="cpu")  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors, or isn't a torch file, and llmc never unpickles arbitrary objects",
            "convert it to safetensors where you trust it, or fetch the model's safetensors",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}", "fetch the file again") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file} holds {type(loaded).__name__}, not a state dict", "give the model's weights")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file}: the entry {name!r} is {type(tensor).__name__}, not a tensor",
                "give the model's weights, not a training checkpoint",
            )
    return loaded


def _own_memory(tensors: dict[str, Tensor], tied_rows: int | None) -> dict[str, Tensor]:
    """Give each tensor memory of its own, as safetensors wants it; leave out the second name of tied embeddings."""
    seen: set[int] = set()
    views: set[tuple[Any, ...]] = set()
    owned: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if view in views and tensor.ndim == 2 and tensor.shape[0] == tied_rows:
            continue
        shared = storage in seen and tensor.numel() > 0
        owned[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        seen.add(storage)
        views.add(view)
    return owned


def _tied_rows(config_file: Path) -> int | None:
    """Return the vocabulary's size where the config says that the embeddings are tied, else None."""
    try:
        config = json.loads(config_file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{config_file} isn't JSON: {error}", "fetch the file again") from error
    text = config.get("text_config") or {}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    rows = config.get("vocab_size", text.get("vocab_size"))
    return rows if tied is True and isinstance(rows, int) else None


def _side_files(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.name.endswith(SIDE_SUFFIXES) and file.name != BIN_INDEX]
    files += (folder / "additional_chat_templates").glob("*.jinja")
    return sorted(file for file in files if file.is_file())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' log, warnings and progress bars, and put everything back.

    One of its GGUF readers draws a bar of its own that no setting governs, so standard error is held back too.
    """
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # parts of it have no annotations
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Hold a lock between processes; the system drops it when the holder dies."""
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
