"""How an inspected model looks on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

if TYPE_CHECKING:
    from ..inspecting import BlockGroup, InspectedSubset, Inspection

_WIDTH = 100


def show(inspection: Inspection, console: Console | None = None) -> None:
    """Print an inspection."""
    rich = console or Console(highlight=False)
    if console is None and not rich.is_terminal:
        rich = Console(highlight=False, width=_WIDTH)
    rich.print(_facts(inspection))
    for group in inspection.groups:
        _show_group(rich, group)
    _show_limits(rich, inspection)


def numbers(blocks: Sequence[int]) -> str:
    """``blocks 0-2, 4`` for 0, 1, 2 and 4."""
    return f"block{'s' * (len(blocks) > 1)} {', '.join(_runs(blocks))}"


def _runs(numbers: Sequence[int]) -> list[str]:
    runs = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return runs


def lines_of(one: InspectedSubset) -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes of a subset's Linears; of experts ``mlp.experts.0-3.up_proj`` stands for the same one of each,
    where it has the same shape."""
    begin = f"{one.subset.experts}."
    experts: dict[tuple[str, str, tuple[int, int]], list[int]] = {}
    for name, shape in zip(one.subset.linears, one.shapes, strict=True):
        routed = one.subset.experts is not None and name.startswith(begin)
        number, _, leaf = name.removeprefix(begin).partition(".") if routed else ("", "", name)
        experts.setdefault((begin if routed else "", leaf, shape), []).extend([int(number)] if routed else [])
    return [
        (f"{path}{','.join(_runs(members))}.{leaf}" if path else leaf, shape)
        for (path, leaf, shape), members in experts.items()
    ]


def _facts(inspection: Inspection) -> Table:
    share = inspection.compressible / max(1, inspection.parameters)
    count = sum(len(group.blocks) for group in inspection.groups)
    adapter = inspection.adapter or "none declared: what follows was found by running the model's code"
    facts = {
        "model": inspection.model,
        "architecture": f"{inspection.architecture} (model_type {inspection.model_type})",
        "adapter": adapter,
        "blocks": f"{count} in {inspection.path}" if count else inspection.path,
        "behind them": ", ".join(inspection.head),
        "parameters": f"{inspection.parameters:,}, {share:.1%} of them in Linears that can be compressed",
    }
    if inspection.adapter is not None and inspection.groups:
        differing = sum(len(group.differences) for group in inspection.groups)
        facts["discovery"] = f"{differing} differences, see below" if differing else "finds what was declared"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    return table


def _show_group(rich: Console, group: BlockGroup) -> None:
    title = numbers(group.blocks)
    each = " each" if len(group.blocks) > 1 else ""
    rich.print(f"\n[bold]{title}[/] ({escape(group.kind)}, {group.parameters:,} parameters{each})")
    table = Table("Linear", "out x in", "reads > writes", "a scale goes into", "seen in", box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for index in (0, 1, 2):
        table.columns[index].no_wrap = True
    for one in group.subsets:
        for row in _rows(one):
            table.add_row(*map(escape, row))
    rich.print(Padding(table, (0, 0, 0, 2)))
    for one in group.subsets:
        if one.reason is not None:
            names = ", ".join(name for name, _ in lines_of(one))
            _note(rich, f"{names}: nothing can absorb a scale: {one.reason}")
    for name, reason in group.loose:
        _note(rich, f"{name}: {reason}")
    for difference in group.differences:
        _note(rich, difference, "DIFFERS ")


def _rows(one: InspectedSubset) -> Iterator[tuple[str, ...]]:
    """A line for each Linear of a subset, and for what else reads its input; what holds for all is on the first."""
    subset = one.subset
    itself = subset.inspect == subset.key
    seen = "itself" if itself else subset.inspect or "the block"
    about: tuple[str, ...] = (f"{subset.reads} > {subset.writes or '?'}", _target(one), seen)
    for name, (rows, columns) in lines_of(one):
        yield name, f"{rows} x {columns}", *about
        about = ("", "", "")
    for name in subset.also:
        yield f"+ {name}", "kept", "", "", ""


def _target(one: InspectedSubset) -> str:
    subset = one.subset
    if subset.prev is None:
        return "-"
    if subset.offset:
        return f"{subset.prev} ({subset.offset:g} + weight)"
    if subset.rows is None:
        return subset.prev
    first = ", ".join(f"{start}-{stop - 1}" for start, stop in subset.rows[:2])
    return f"{subset.prev} rows {first}{', ...' if len(subset.rows) > 2 else ''}"


def _show_limits(rich: Console, inspection: Inspection) -> None:
    if inspection.problem is not None:
        rich.print("\n[bold red]can't be compressed[/]")
        _note(rich, inspection.problem)
    if inspection.refused:
        rich.print("\n[bold]what can't be done[/]")
        for what, reason in inspection.refused:
            _note(rich, f"{what}: {reason}")


def _note(rich: Console, text: str, mark: str = "") -> None:
    rich.print(Padding(f"[yellow]{mark}[/]{escape(text)}" if mark else escape(text), (0, 0, 0, 2)))
