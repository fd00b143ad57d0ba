"""What is told of a mixture's experts: of each block in one line, of like experts under one name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

_EXPERT = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<index>\d+)\.(?P<linear>.+)")


@dataclass(frozen=True)
class BlockExperts:
    """How a block's experts were calibrated.

    Attributes:
        block: its unit.
        tokens: calibration tokens that each expert was shown, by its number.
        scarce: the numbers of those that were solved with the tokens of all experts, since they saw too few.
        wanted: too few are fewer than these.
        plain: why experts were treated by a simpler method, and which.
    """

    block: str
    tokens: Mapping[int, int]
    scarce: tuple[int, ...]
    wanted: int
    plain: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> BlockExperts | None:
        """From a block's line in the journal; None where no expert's tokens were counted."""
        notes = [(expert, note) for name, note in row["layers"].items() if (expert := _expert(name, note)) is not None]
        if not notes:
            return None
        scarce = [(expert, note["wanted"]) for expert, note in notes if note["wanted"] is not None]
        plain: dict[str, list[int]] = {}
        for expert, note in notes:
            if note["fallback"]:
                plain.setdefault(note["fallback"], []).append(expert)
        return cls(
            row["unit"],
            {expert: note["tokens"] for expert, note in notes},
            tuple(sorted({expert for expert, _ in scarce})),
            max((wanted for _, wanted in scarce), default=0),
            {why: tuple(sorted(set(experts))) for why, experts in plain.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``metrics.json``."""
        counts = [self.tokens[expert] for expert in sorted(self.tokens)]
        return {
            "block": self.block,
            "experts": len(counts),
            "tokens": {"fewest": min(counts), "median": median(counts), "most": max(counts)},
            "counts": counts,
            "solved_with_all_tokens": list(self.scarce),
            "wanted": self.wanted or None,
            "plain": {why: list(experts) for why, experts in self.plain.items()},
        }

    def warnings(self) -> list[str]:
        """One line for all that fell back in one way."""
        lines = []
        if self.scarce:
            lines.append(
                f"{self.block}: {self._some(self.scarce)} saw fewer than {self.wanted} calibration tokens "
                f"({self._fewest(self.scarce)}) and were solved with those of all experts"
            )
        lines += [
            f"{self.block}: {self._some(experts)} ({self._fewest(experts)}): {why}"
            for why, experts in self.plain.items()
        ]
        return lines

    def _some(self, experts: tuple[int, ...]) -> str:
        return f"{len(experts)} of {len(self.tokens)} experts"

    def _fewest(self, experts: tuple[int, ...]) -> str:
        least = min(experts, key=lambda expert: (self.tokens[expert], expert))
        return f"fewest: expert {least} with {self.tokens[least]}"


def _expert(name: str, note: Mapping[str, Any]) -> int | None:
    """The expert that a Linear is of, if its tokens were counted."""
    found = _EXPERT.fullmatch(name)
    return int(found["index"]) if found is not None and note.get("tokens") is not None else None


def fallbacks(row: Mapping[str, Any]) -> list[str]:
    """What a block's Linears were treated by a simpler method for, or with others' tokens: a line for each Linear, but
    one for all experts that it happened to alike."""
    layers = row["layers"].items()
    alone = [(name, note) for name, note in layers if note["fallback"] and _expert(name, note) is None]
    experts = BlockExperts.of(row)
    lines = [f"{row['unit']}, {name}: {note['fallback']}" for name, note in alone]
    return lines if experts is None else [*lines, *experts.warnings()]


def collapsed(names: Iterable[str]) -> dict[str, list[str]]:
    """Linears' names in their order, the same Linear of several experts as one: ``experts.0-63.gate_proj``. For each
    such name those that it stands for."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        found = _EXPERT.fullmatch(name)
        key = (name, "") if found is None else (found["experts"], found["linear"])
        groups.setdefault(key, []).append((0 if found is None else int(found["index"]), name))
    return {
        f"{first}.{_ranges(index for index, _ in members)}.{linear}" if linear else first: [name for _, name in members]
        for (first, linear), members in groups.items()
    }


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3,5`` of 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
