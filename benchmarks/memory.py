"""Measures whether llmc's peak memory depends on a model's depth, and how often it reads each tensor.

    python benchmarks/memory.py

For 4, 8, 16 and 32 blocks it writes a synthetic Llama (``synthetic_llama.py``; 59 MB a block) into a temporary folder,
lets llmc compress it in a process of its own, and notes three things: that process's peak resident set, as the kernel
accounted for it; ``bytes_read`` of the ``metrics.json`` that llmc leaves in its save path; and the bytes of all tensors
in the checkpoint. Below each table is the slope of a straight line fitted to the peaks, as a percentage of a block's
bytes: 0 % if memory doesn't depend on depth, 100 % if every block stays in memory as stored. A read ratio of 1 means
that every tensor was read once.

Two methods are measured: RTN, which needs no data, and GPTQ with 8 samples of 128 tokens. ``--exports fake`` also
measures ``llmc export`` of each finished run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from versus_peer import MB, CommandFailed, Usage, measure

WRITER = Path(__file__).with_name("synthetic_llama.py")
SAMPLES, SEQ_LEN = 8, 128
W4_G64 = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 64}
GPTQ_SPECIAL = {
    "actorder": True,
    "static_groups": True,
    "percdamp": 0.01,
    "blocksize": 128,
    "true_sequential": True,
}
METHODS = ("RTN", "GPTQ")


@dataclass(frozen=True)
class Measurement:
    """One run of llmc on a model of ``blocks`` blocks; ``bytes_read`` is None if llmc left no account of it."""

    blocks: int
    usage: Usage
    block_bytes: int
    checkpoint_bytes: int
    bytes_read: int | None


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor of a checkpoint, from the headers of its safetensors files."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            sizes[name] = end - begin
    return sizes


def block_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes of one block, all of them being equal."""
    return sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))


def llmc_config(method: str, model: Path, calib: Path, save_path: Path) -> dict[str, Any]:
    """The YAML of a run: four bits in groups of 64, nothing evaluated."""
    config: dict[str, Any] = {
        "base": {"seed": 42, "device": "cpu"},
        "model": {"type": "auto", "path": str(model), "torch_dtype": "torch.float32"},
        "quant": {"method": method, "weight": W4_G64},
        "save": {"save_vllm": True, "save_path": str(save_path)},
    }
    if method == "GPTQ":
        config["calib"] = {
            "name": "text",
            "path": str(calib),
            "n_samples": SAMPLES,
            "bs": 1,
            "seq_len": SEQ_LEN,
            "preproc": "sequential",
        }
        config["quant"]["special"] = GPTQ_SPECIAL
    return config


def write_calibration_text(path: Path) -> None:
    """Text that is long enough: the synthetic model's tokens are bytes."""
    path.write_text("".join(f"{i} times {i} is {i * i}. " for i in range(SAMPLES * SEQ_LEN)))


def bytes_read(save_path: Path) -> int | None:
    """What llmc says it has read of the checkpoint, or None if it says nothing."""
    metrics = save_path / "metrics.json"
    return json.loads(metrics.read_text()).get("bytes_read") if metrics.is_file() else None


def measure_methods(args: argparse.Namespace, blocks: int) -> Iterator[tuple[str, Measurement]]:
    """Write the model of that many blocks, measure every method on it, delete everything."""
    with tempfile.TemporaryDirectory(prefix="llmc-memory-", dir=args.temporary) as temporary:
        folder = Path(temporary)
        model, calib = folder / "model", folder / "calib.txt"
        # In a process of its own: what this one holds would count into the peaks that it measures.
        measure([sys.executable, WRITER, model, "--blocks", str(blocks), *args.sizes])
        sizes = tensor_sizes(model)
        write_calibration_text(calib)
        for method in args.methods:
            save_path, config_path = folder / method, folder / f"{method}.yml"
            config_path.write_text(yaml.safe_dump(llmc_config(method, model, calib, save_path), sort_keys=False))
            usage = measure([*args.llmc_command, "--config", config_path])
            block, whole = block_bytes(sizes), sum(sizes.values())
            yield method, Measurement(blocks, usage, block, whole, bytes_read(save_path))
            for target in args.exports:
                usage = measure([*args.llmc_command, "export", "--from", save_path, "--to", target])
                yield f"{method}, exported to {target}", Measurement(blocks, usage, block, whole, None)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the straight line that fits the points best (least squares)."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def table(method: str, measurements: Sequence[Measurement]) -> str:
    """All runs of a method, and the slope of their peaks, in Markdown."""
    lines = [
        f"### {method}",
        "",
        "| blocks | checkpoint, MB | read, MB | read / checkpoint | peak memory, MB | CPU s | wall s |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [row(measurement) for measurement in measurements]
    block = measurements[0].block_bytes
    summary = f"A block is {block / MB:.1f} MB."
    if len(measurements) > 1:
        per_block = slope([(measurement.blocks, measurement.usage.peak_bytes) for measurement in measurements])
        summary += f" Each adds {per_block / MB:.2f} MB to peak memory: {100 * per_block / block:.1f} % of its size."
    return "\n".join([*lines, "", summary])


def row(measurement: Measurement) -> str:
    """One line of the table."""
    usage, read = measurement.usage, measurement.bytes_read
    cells = [
        str(measurement.blocks),
        f"{measurement.checkpoint_bytes / MB:.1f}",
        "-" if read is None else f"{read / MB:.1f}",
        "-" if read is None else f"{read / measurement.checkpoint_bytes:.4f}",
        f"{usage.peak_bytes / MB:.0f}",
        f"{usage.cpu_seconds:.1f}",
        f"{usage.wall_seconds:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--exports", nargs="+", default=[], metavar="FORMAT", help="what finished runs are exported to")
    parser.add_argument("--temporary", type=Path, help="where to make the temporary folder, which takes 2 GB a method")
    parser.add_argument(
        "--sizes", type=shlex.split, default=[], help='other sizes for synthetic_llama.py, such as "--hidden 1024"'
    )
    parser.add_argument(
        "--llmc-command",
        type=shlex.split,
        default=[sys.executable, "-m", "llmc"],
        help="what runs llmc; --config FILE is appended (default: this Python, -m llmc)",
    )
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    measurements: dict[str, list[Measurement]] = {}
    try:
        for blocks in args.blocks:
            for method, measurement in measure_methods(args, blocks):
                measurements.setdefault(method, []).append(measurement)
                print(f"{method}: {measurement}", file=sys.stderr, flush=True)
    except CommandFailed as error:
        sys.exit(str(error))
    print("\n\n".join(table(method, runs) for method, runs in measurements.items()))


if __name__ == "__main__":
    main()
