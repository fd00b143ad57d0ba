"""What looking at each layer costs: the same run with and without ``report.analysis``, in a process of its own each.

    python benchmarks/analysis_cost.py --model DIR --calib valid.txt --eval test.txt --out FOLDER --method GPTQ

Prints wall time, CPU time, the share of the blocks' time that went into the analysis, and peak memory. Where other
programs run, too, both times of a run depend on them: compare those of a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml


def config(args: argparse.Namespace, folder: Path, *, analysis: bool) -> dict[str, Any]:
    text = {"name": "text", "bs": 1}
    samples = {"n_samples": args.samples, "seq_len": 512, "preproc": "sequential", "seed": 42}
    windows = {"seq_len": 1024, "num_chunks": args.windows, "eval_pos": ["fake_quant"]}
    return {
        "base": {"seed": 42, "device": args.device, "threads": args.threads},
        "model": {"type": "auto", "path": str(args.model), "torch_dtype": "torch.float32"},
        "calib": {**text, "path": str(args.calib), **samples},
        "eval": {**text, "path": str(args.eval), **windows},
        "quant": {
            "method": args.method,
            "weight": {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 64},
        },
        "report": {"analysis": analysis, "html": False},
        "save": {"save_fake": True, "save_path": str(folder)},
    }


def measure(args: argparse.Namespace, *, analysis: bool) -> dict[str, float]:
    folder = args.out / ("with" if analysis else "without")
    file = folder.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config(args, folder, analysis=analysis)))
    command = [sys.executable, "-m", "llmc", "--config", str(file), "--set", "save.on_existing=overwrite"]
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, behind = time.perf_counter() - started, os.times()
    cpu = behind.children_user + behind.children_system - before.children_user - before.children_system
    metrics = json.loads((folder / "metrics.json").read_text())
    spent = [row["seconds_by_kind"] for row in metrics["blocks"]]
    share = sum(kinds.get("analyze", 0.0) for kinds in spent) / sum(sum(kinds.values()) for kinds in spent)
    return {"wall": wall, "cpu": cpu, "share": share, "peak": metrics["peak_host_bytes"] / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calib", "eval", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--method", default="GPTQ")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64, help="of 512 tokens, to calibrate on")
    parser.add_argument("--windows", type=int, default=32, help="of 1024 tokens, to evaluate on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {name: measure(args, analysis=name == "with") for name in ("without", "with")}
    for name, one in found.items():
        print(
            f"{name:>8}: {one['wall']:7.1f} s, {one['cpu']:7.1f} s of CPU, {one['share']:6.1%} of the blocks' time in "
            f"the analysis, peak {one['peak']:.0f} MB"
        )
    print(f"   ratio: {found['with']['cpu'] / found['without']['cpu']:.3f} (CPU)")


if __name__ == "__main__":
    main()
