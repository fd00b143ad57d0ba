"""``sensitivity.json`` on the console."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console as Rich
from rich.table import Table

from ..budget.sensitivity import Sensitivity, most_sensitive

_MOST = 40


def show(found: Sensitivity, file: Path) -> None:
    """Layers, the most sensitive first, with the loss that each candidate is expected to cost."""
    rich = Rich(highlight=False, soft_wrap=True)
    names = [str(one["name"]) for one in found.candidates]
    rows = list(most_sensitive(found))
    table = Table("expected loss, millinats per token", *names, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, trials in rows[:_MOST]:
        table.add_row(name, *(f"{1000 * trial.loss:.3g}" for trial in trials))
    sums = [sum(trials[index].loss for _, trials in rows) for index in range(len(names))]
    table.add_row("all layers", *(f"{1000 * total:.3g}" for total in sums), style="bold")
    rich.print(table)
    if len(rows) > _MOST:
        rich.print(f"... and {len(rows) - _MOST} more, less sensitive per weight")
    rich.print(f"\nwritten: {file}\nuse: quant.mix_bits: {{budget: 4.25, from: {file}}}", markup=False)
