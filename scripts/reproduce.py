"""Runs a suite of configurations and compares their perplexities with published ones.

    python scripts/reproduce.py --suite tiny --models models --data data --jobs 2 --output outputs/tiny.md
    python scripts/reproduce.py --suite llama2 --list

Suites are the folders in configs/reproduce/. What lacks its model or its text is named and left out. Ends with 0 if
every number that could be measured is within its tolerance (or better than published), with 1 if one isn't, or a run
failed, and with 2 if something is wrong with the suite itself. docs/reproduction.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the llmc beside this file, installed or not

from llmc.errors import ConfigError, LlmcError
from scripts.reproduction.golden import read_golden, write_golden
from scripts.reproduction.page import line, missing_lines, page, summary, write_page
from scripts.reproduction.places import Places
from scripts.reproduction.published import Published, read_published
from scripts.reproduction.running import ROOT, Execute, Outcome, Runner, execute
from scripts.reproduction.suites import Cell, Suite, read_models, read_suite
from scripts.reproduction.verdicts import WRONG, Judged, judge_cell, measured_golden

SUITES = ROOT / "configs" / "reproduce"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python scripts/reproduce.py",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--suite", required=True, metavar="NAME", help="a folder in configs/reproduce/, or any other")
    made.add_argument("--models", type=Path, default=ROOT / "models", metavar="DIR", help="holds a folder per model")
    made.add_argument("--data", type=Path, default=ROOT / "data", metavar="DIR", help="holds a folder per data set")
    made.add_argument("--download", action="store_true", help="fetch what isn't there from the Hugging Face hub")
    made.add_argument("--only", action="append", metavar="ID", help="cells by id, or a pattern such as 'gptq-*'")
    made.add_argument("--list", action="store_true", help="show the cells and what is missing, and run nothing")
    made.add_argument("--resume", action="store_true", help="keep finished cells, and let interrupted ones go on")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time")
    made.add_argument("--threads", type=int, metavar="N", help="threads of each cell, if not what its file says")
    made.add_argument("--device", help="auto, cpu, cuda or cuda:N, if not what the files say")
    made.add_argument("--work", type=Path, metavar="DIR", help="where runs are kept (outputs/reproduce/SUITE)")
    made.add_argument("--output", type=Path, metavar="FILE.md", help="write a page of Markdown")
    made.add_argument("--update-golden", action="store_true", help="take what is measured as the golden numbers")
    return made


def main(arguments: Sequence[str] | None = None, execute: Execute = execute) -> int:
    given = parser().parse_args(arguments)
    try:
        return _main(given, execute)
    except LlmcError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(given: argparse.Namespace, execute: Execute) -> int:
    published = read_published(SUITES / "published.tsv")
    models = read_models(SUITES / "models.toml")
    suite = read_suite(_suite_folder(given.suite), ROOT, models, published)
    cells = _chosen(suite, given.only)
    settings = tuple(
        f"base.{key}={value}" for key, value in (("threads", given.threads), ("device", given.device)) if value
    )
    places = Places(given.models, given.data, given.download)
    work = given.work or ROOT / "outputs" / "reproduce" / suite.name
    runner = Runner(work.resolve(), places, models, given.resume, settings, execute)
    if given.list:
        _show(cells, runner, published)
        return 0
    outcomes: dict[str, Outcome] = {}
    for outcome in runner.run(cells, max(given.jobs, 1)):
        outcomes[outcome.cell.id] = outcome
        if given.update_golden and outcome.metrics is not None:
            write_golden(suite.folder, measured_golden(outcome))
        _tell(outcome, judge_cell(outcome, published, read_golden(suite.folder)))
    ordered = [outcomes[cell.id] for cell in cells]
    golden = read_golden(suite.folder)
    judged = [one for outcome in ordered for one in judge_cell(outcome, published, golden)]
    print("\n".join([summary(judged), *(f"missing: {what}" for what in missing_lines(ordered))]))
    if given.output:
        write_page(given.output, page(suite, ordered, judged, published))
    return int(any(one.verdict in WRONG for one in judged))


def _suite_folder(name: str) -> Path:
    folder = SUITES / name
    if folder.is_dir() or Path(name).is_dir():
        return folder if folder.is_dir() else Path(name)
    known = sorted(file.parent.name for file in SUITES.glob("*/suite.toml"))
    raise ConfigError(f"there is no suite {name}", f"known are {', '.join(known)}")


def _chosen(suite: Suite, only: Sequence[str] | None) -> list[Cell]:
    for pattern in only or ():
        if not any(fnmatch(cell.id, pattern) for cell in suite.cells):
            known = ", ".join(cell.id for cell in suite.cells)
            raise ConfigError(f"--only {pattern}: suite {suite.name} has no such cell", f"it has {known}")
    return [cell for cell in suite.cells if not only or any(fnmatch(cell.id, pattern) for pattern in only)]


def _show(cells: Sequence[Cell], runner: Runner, published: Mapping[str, Published]) -> None:
    for cell in cells:
        print(f"{cell.id}  {cell.model}  {cell.config}")
        for one in cell.compare:
            known = published.get(one.published or "")
            print(f"    {one.position}: {known.value if known else 'golden'}  {known.id if known else ''}")
        for what in runner.missing(cell):
            print(f"    missing: {what}")


def _tell(outcome: Outcome, judged: Sequence[Judged]) -> None:
    for one in judged:
        print(line(one), f" {outcome.seconds:.0f} s" if outcome.seconds else "", flush=True)
    if outcome.error:
        print(outcome.error, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
