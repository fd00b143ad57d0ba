"""Runs llmc and llm-compressor on the same model, data and method, in turn, and prints what each process cost.

    python benchmarks/versus_peer.py --model DIR --calib FILE --peer-python PY --method gptq --rounds 1

``PY`` is the Python of an environment with llm-compressor; what it runs is ``peer_llmcompressor.py`` beside this file.
Both processes are measured whole and from outside: from the start of the interpreter to its end, so imports, loading
and saving count, and nothing is evaluated by either. Of several rounds the median is shown; each round runs both, and
the one that goes first alternates. Use a machine that does nothing else: threads that wait for a busy core spin, so
other people's work inflates CPU seconds too, and not by the same factor on both sides.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PEER_SCRIPT = Path(__file__).with_name("peer_llmcompressor.py")
PACKAGE = Path(__file__).parents[1] / "llmc"
LOG_TAIL = 3000
QUIET_LOAD = 0.5
MB = 2**20


@dataclass(frozen=True)
class Usage:
    """What a finished process cost.

    ``cpu_seconds`` is user plus system time of the process and of all descendants that were waited for; ``peak_bytes``
    is the largest resident set of any one of them, which counts the pages of memory-mapped files while they are mapped.
    """

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


class CommandFailed(RuntimeError):
    """A measured command ended with another status than zero."""


def measure(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end and return its cost, as the kernel accounted for it (``os.wait4``).

    The peak that Linux reports begins with the resident set of the process that starts the command, so the caller must
    stay small: the benchmarks import no torch where they measure.
    """
    arguments = [str(part) for part in command]
    with tempfile.TemporaryFile() as log:
        start = time.monotonic()
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has reaped it; Popen should know
        if process.returncode != 0:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL))
            tail = log.read().decode(errors="replace")
            raise CommandFailed(f"{shlex.join(arguments)} ended with status {process.returncode}:\n{tail}")
    return Usage(used.ru_utime + used.ru_stime, wall, used.ru_maxrss * 1024)  # Linux counts KiB


@dataclass(frozen=True)
class Setting:
    """What both sides do: ``sections`` is llmc's YAML, the flags say the same to the peer's script."""

    samples: int
    sections: Mapping[str, Any]
    peer: tuple[str, ...] = ()
    saved: str = "save_vllm"
    seq_len: int = 512


def _groups(method: str, *, symmetric: bool, **special: Any) -> dict[str, Any]:
    weight = {"bit": 4, "symmetric": symmetric, "granularity": "per_group", "group_size": 64}
    return {"quant": {"method": method, "weight": weight, "special": special}}


def _w8a8(method: str, **special: Any) -> dict[str, Any]:
    weight = {"bit": 8, "symmetric": True, "granularity": "per_channel"}
    act = {"bit": 8, "symmetric": True, "granularity": "per_token"}
    return {"quant": {"method": method, "weight": weight, "act": act, "special": special}}


def _two_of_four(method: str) -> dict[str, Any]:
    return {"sparse": {"method": method, "weight": {"sparsity": 0.5, "pattern": "2:4"}}}


def _fp8() -> dict[str, Any]:
    grid = {"bit": "e4m3", "symmetric": True}
    weight, act = {**grid, "granularity": "per_channel"}, {**grid, "granularity": "per_token"}
    return {"quant": {"method": "RTN", "weight": weight, "act": act}}


_GPTQ = {"actorder": True, "static_groups": True, "percdamp": 0.01, "blocksize": 128, "true_sequential": True}
SETTINGS = {
    "gptq": Setting(64, _groups("GPTQ", symmetric=True, **_GPTQ), ("--sym",)),
    "awq": Setting(16, _groups("Awq", symmetric=False, weight_clip=True), ("--asym",)),
    "rtn": Setting(0, _w8a8("RTN")),
    "fp8": Setting(0, _fp8()),
    "smoothquant": Setting(16, _w8a8("SmoothQuant", alpha=0.5)),
    "wanda": Setting(16, _two_of_four("Wanda"), saved="save_fake"),
    "sparsegpt": Setting(16, _two_of_four("SparseGPT"), saved="save_fake"),
}


def llmc_config(setting: Setting, model: Path, calib: Path, save_path: Path) -> dict[str, Any]:
    """The YAML of llmc's side."""
    texts: dict[str, Any] = {
        "name": "text",
        "path": str(calib),
        "n_samples": setting.samples,
        "bs": 1,
        "seq_len": setting.seq_len,
        "preproc": "sequential",
    }
    return {
        "base": {"seed": 42, "device": "cpu"},
        "model": {"type": "auto", "path": str(model), "torch_dtype": "torch.float32"},
        **({"calib": texts} if setting.samples else {}),
        **setting.sections,
        "save": {setting.saved: True, "save_path": str(save_path)},
    }


def measure_llmc(command: Sequence[str], config: Mapping[str, Any], folder: Path) -> Usage:
    """Write the configuration into the folder and measure llmc's run of it."""
    config_path = folder / "llmc.yml"
    config_path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return measure([*command, "--config", config_path])


def measure_peer(python: Path, method: str, model: Path, calib: Path, folder: Path) -> Usage:
    """Measure llm-compressor's run of the same setting."""
    setting = SETTINGS[method]
    options = {
        "--model": model,
        "--calib": calib,
        "--method": method,
        "--samples": setting.samples,
        "--seq-len": setting.seq_len,
        "--out": folder / "peer",
    }
    flags = [str(part) for option in options.items() for part in option]
    return measure([python, PEER_SCRIPT, *flags, *setting.peer])


def warn_if_busy() -> None:
    """Say so if others were using the machine during the last minute, before anything was measured."""
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        print(f"warning: the load average is {load:.1f}: figures measured now mislead", file=sys.stderr)


def run_rounds(args: argparse.Namespace) -> dict[str, list[Usage]]:
    """Measure both sides ``args.rounds`` times, each time into a new temporary folder."""
    usages: dict[str, list[Usage]] = {"llmc": [], "llm-compressor": []}
    for round_number in range(args.rounds):
        names = list(usages) if round_number % 2 == 0 else list(reversed(usages))
        for name in names:
            with tempfile.TemporaryDirectory(prefix="llmc-versus-") as temporary:
                folder = Path(temporary)
                if name == "llmc":
                    config = llmc_config(SETTINGS[args.method], args.model, args.calib, folder / "save")
                    usage = measure_llmc(args.llmc_command, config, folder)
                else:
                    usage = measure_peer(args.peer_python, args.method, args.model, args.calib, folder)
            usages[name].append(usage)
            print(f"round {round_number + 1}, {name}: {usage}", file=sys.stderr, flush=True)
    return usages


def median(usages: Sequence[Usage]) -> Usage:
    """The median of each figure by itself."""
    return Usage(
        cpu_seconds=statistics.median(usage.cpu_seconds for usage in usages),
        wall_seconds=statistics.median(usage.wall_seconds for usage in usages),
        peak_bytes=int(statistics.median(usage.peak_bytes for usage in usages)),
    )


def table(method: str, usages: Mapping[str, Sequence[Usage]]) -> str:
    """Both sides' figures and their ratios, in Markdown."""
    ours, theirs = median(usages["llmc"]), median(usages["llm-compressor"])
    rows = [
        ("CPU s", ours.cpu_seconds, theirs.cpu_seconds),
        ("wall s", ours.wall_seconds, theirs.wall_seconds),
        ("peak memory, MB", ours.peak_bytes / MB, theirs.peak_bytes / MB),
    ]
    lines = [f"| {method} | llmc | llm-compressor | llmc / llm-compressor |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {mine:.1f} | {other:.1f} | {mine / other:.3f} |" for name, mine, other in rows]
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, in safetensors")
    parser.add_argument("--calib", type=Path, required=True, help="text file to calibrate with")
    parser.add_argument("--peer-python", type=Path, required=True, help="Python of an environment with llm-compressor")
    parser.add_argument("--method", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--llmc-command",
        type=shlex.split,
        default=[sys.executable, "-m", "llmc"],
        help="what runs llmc; --config FILE is appended (default: this Python, -m llmc)",
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    args.model, args.calib = args.model.resolve(), args.calib.resolve()
    return args


def main() -> None:
    args = parse_args()
    warn_if_busy()
    compileall.compile_dir(PACKAGE, quiet=1)  # as pip does with what it installs, so the peer's modules are compiled
    try:
        usages = run_rounds(args)
    except CommandFailed as error:
        sys.exit(str(error))
    print(table(args.method, usages))


if __name__ == "__main__":
    main()
