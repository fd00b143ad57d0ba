"""Runs the recipes of `p1_recipes.yml` on protocol P1 and prints their perplexities as tables.

    python benchmarks/p1_table.py --model DIR --calib valid.txt --eval test.txt --out FOLDER --only 'act/*/W8A8'

Each cell is a run of llmc in a process of its own, with a folder of its own in ``FOLDER`` that holds its YAML file, its
log and its metrics. A cell that is already there isn't run again: the command can be killed and repeated, and tables
grow. ``--only`` takes patterns of ``table/row/column`` (``fnmatch``); without it, all cells are run. Cells that weren't
run stay empty, those whose run failed say so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).with_name("p1_recipes.yml")
WINDOWS, WINDOW, SAMPLE = 32, 1024, 512


@dataclass(frozen=True)
class Cell:
    """A place in a table, and the sections of the run that fills it."""

    table: str
    row: str
    column: str
    sections: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What ``--only`` matches."""
        return f"{self.table}/{self.row}/{self.column}"

    @property
    def folder(self) -> str:
        """Where its run is kept."""
        return re.sub(r"\W+", "_", self.name.lower()).strip("_")


def over(below: Any, above: Any) -> Any:
    """``above`` laid over ``below``, key by key."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: over(below.get(key, above.get(key)), above.get(key, below.get(key))) for key in {**below, **above}}
    return above


def cells(recipes: Mapping[str, Any]) -> Iterator[Cell]:
    """All cells, table by table."""
    for table, content in recipes.items():
        for row, own in content["rows"].items():
            for column, sections in content["columns"].items():
                yield Cell(table, row, column, over(over(content["base"], own), sections))


def config(cell: Cell, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The YAML of a cell's run."""
    sections = dict(cell.sections)
    samples = sections.pop("samples", None)
    evaluation = {
        "eval_pos": ["fake_quant"],
        "name": "text",
        "path": str(args.eval),
        "bs": 1,
        "seq_len": WINDOW,
        "num_chunks": args.windows,
    }
    whole: dict[str, Any] = {
        "base": {"seed": 42, "device": "cpu", "threads": args.threads},
        "model": {"type": "auto", "path": str(args.model), "torch_dtype": "torch.float32"},
        "eval": evaluation,
        "save": {"save_path": str(folder / "run"), "on_existing": "resume"},
        "report": {"html": False, "analysis": False},  # a tenth of a cell's time
    }
    if samples is not None:
        whole["calib"] = {
            "name": "text",
            "path": str(args.calib),
            "n_samples": samples,
            "bs": 1,
            "seq_len": SAMPLE,
            "preproc": "sequential",
        }
    merged: dict[str, Any] = over(whole, sections)
    return merged


def metrics(folder: Path) -> dict[str, Any] | None:
    """What a finished run measured."""
    file = folder / "run" / "metrics.json"
    return json.loads(file.read_text()) if file.is_file() else None


def fill(cell: Cell, args: argparse.Namespace) -> None:
    """Run a cell, unless it has been run."""
    folder = args.out / cell.folder
    if metrics(folder) is not None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(config(cell, args, folder), sort_keys=False))
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "llmc", "--config", str(file)]
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    found = metrics(folder)
    print(f"{cell.name}: {'failed' if status or found is None else shown(found)}", file=sys.stderr, flush=True)


def shown(found: Mapping[str, Any] | None) -> str:
    """A cell's text."""
    if found is None:
        return ""
    return f"{found['evaluation'][0]['value']:.2f}"


def table(name: str, content: Mapping[str, Any], args: argparse.Namespace) -> str:
    """A table in Markdown, with what has been run so far."""
    columns = list(content["columns"])
    lines = [f"### {content['title']}", "", f"| | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for row in content["rows"]:
        found = [shown(metrics(args.out / Cell(name, row, column, {}).folder)) for column in columns]
        lines.append(f"| {row} | {' | '.join(found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for option, text in (("model", "the checkpoint"), ("calib", "valid.txt"), ("eval", "test.txt"), ("out", "runs")):
        parser.add_argument(f"--{option}", type=Path, required=True, help=text)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of table/row/column; an empty one runs none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=WINDOWS, help="fewer are another protocol, for a quick look")
    args = parser.parse_args()
    recipes = yaml.safe_load(RECIPES.read_text())
    for cell in cells(recipes):
        if any(fnmatch(cell.name, pattern) for pattern in args.only):
            fill(cell, args)
    print("\n\n".join(table(name, content, args) for name, content in recipes.items()))


if __name__ == "__main__":
    main()
