"""GPTQ with one scheme for all layers against schemes out of a budget, at equal size, on protocol P1.

    python benchmarks/budget.py --model DIR --calib valid.txt --eval test.txt --out FOLDER

Measures the sensitivity once, then runs each cell from it, all with the same calibration and evaluation text. What is
already in ``FOLDER`` isn't run again: the command can be killed and repeated. ``--samples 16 --windows 8`` is a quick
look, for all competitors alike. At the first size schemes are chosen by relative errors alone, too: what the importance
of layers is good for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from p1_table import WINDOWS, Cell, config, fill, metrics

GRID = {"symmetric": False, "granularity": "per_group", "group_size": 64}
BITS = (2, 3, 4, 5, 6, 8)
OVERHEAD = {bit: bit + (16 + bit) / GRID["group_size"] for bit in BITS}  # a scale of 16 bits and a zero point a group
SYMMETRIC = {4 + 16 / GRID["group_size"]: 4}  # sizes at which the one scheme has no zero points


def cell(name: str, column: str, samples: int, bit: int, *, symmetric: bool = False, **mix_bits: object) -> Cell:
    """A run of GPTQ."""
    weight = {"bit": bit, **GRID, "symmetric": symmetric}
    quant = {"method": "GPTQ", "weight": weight, "special": {"actorder": True, "static_groups": True}}
    if mix_bits:
        quant["mix_bits"] = mix_bits
    measured_by = {"type": ["ppl", "token_acc"]}  # perplexity, and the divergence that a budget's losses estimate
    return Cell("budget", name, column, {"samples": samples, "quant": quant, "eval": measured_by})


def cells(args: argparse.Namespace, losses: Path) -> Iterator[Cell]:
    """Of each size the run with one scheme, if one has it, and the run with a budget."""
    unweighed = {"budget": OVERHEAD[args.bits[0]], "from": str(without_importance(losses))}
    yield cell("budget, relative errors alone", f"{OVERHEAD[args.bits[0]]:.4f}", args.samples, 4, **unweighed)
    for bit in args.bits:
        yield cell("uniform", f"{OVERHEAD[bit]:.4f}", args.samples, bit)
    for size in set(args.budgets) & set(SYMMETRIC):
        yield cell("uniform", f"{size:.4f}", args.samples, SYMMETRIC[size], symmetric=True)
    for size in [*(OVERHEAD[bit] for bit in args.bits), *args.budgets]:
        spent = {"budget": size, "from": str(losses)}
        yield cell("budget", f"{size:.4f}", args.samples, 4, **spent)


def measured(args: argparse.Namespace) -> Path:
    """``sensitivity.json`` of the model, measured unless it's there."""
    folder = args.out / "losses"
    file = folder / "run" / "sensitivity.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        candidates = [{"bit": bit} for bit in BITS]
        content = config(cell("losses", "", args.samples, 4, budget=4.25, candidates=candidates), args, folder)
        (folder / "config.yml").write_text(yaml.safe_dump(content, sort_keys=False))
        command = [sys.executable, "-m", "llmc", "sensitivity", "--config", str(folder / "config.yml")]
        with (folder / "log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    return file


def without_importance(losses: Path) -> Path:
    """The same file with relative errors in the place of losses."""
    content = json.loads(losses.read_text(encoding="utf-8"))
    for layer in content["layers"]:
        for trial in layer["trials"]:
            trial["loss"] = trial["error"]
    file = losses.with_name("errors.json")
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for option, text in (("model", "the checkpoint"), ("calib", "valid.txt"), ("eval", "test.txt"), ("out", "runs")):
        parser.add_argument(f"--{option}", type=Path, required=True, help=text)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4], help="uniform runs, and budgets of their size")
    parser.add_argument("--budgets", type=float, nargs="*", default=[4.25], help="further budgets")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    runs = list(cells(args, measured(args)))
    for one in runs:
        fill(one, args)
    print("| schemes | asked | bits per weight | perplexity | divergence | expected |\n|---|" + "---:|" * 5)
    for one in runs:
        found = metrics(args.out / one.folder)
        if found is not None:
            perplexity, divergence = (
                next(row for row in found["evaluation"] if row["kind"] == kind) for kind in ("ppl", "token_acc")
            )
            expected = f"{found['bit_budget']['loss']:.4f}" if found.get("bit_budget") else ""
            values = f"{found['bits_per_weight']:.4f} | {perplexity['value']:.2f} | {divergence['kl']:.4f} | {expected}"
            print(f"| {one.row} | {one.column} | {values} |")


if __name__ == "__main__":
    main()
