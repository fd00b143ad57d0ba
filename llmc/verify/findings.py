"""What is found, and how it's said: one line each, with file, tensor and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

REWRITE = "export the folder again"


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        place: name of the file.
        tensor: name of the tensor or module; empty where the file is meant.
        problem: what is wrong with it.
        remedy: what to do.
    """

    place: str
    tensor: str
    problem: str
    remedy: str = REWRITE

    def __str__(self) -> str:
        where = f"{self.place}: {self.tensor}" if self.tensor else self.place
        return f"{where}: {self.problem} -> {self.remedy}"


@dataclass
class Report:
    """What was looked at, and what came out.

    Attributes:
        target: the folder or file.
        findings: what is wrong.
        checked: what was looked at, one line each.
        notes: what is worth knowing and not wrong.
        unjudged: why something that matters couldn't be looked at; empty if nothing stood in the way.
    """

    target: Path
    findings: list[Finding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unjudged: str = ""

    def found(self, place: Path | str, tensor: str, problem: str, remedy: str = REWRITE) -> None:
        """Add a finding."""
        self.findings.append(Finding(place.name if isinstance(place, Path) else place, tensor, problem, remedy))

    @property
    def exit_code(self) -> int:
        """0 clean, 1 something was found, 2 it can't be judged."""
        return 1 if self.findings else 2 if self.unjudged else 0
