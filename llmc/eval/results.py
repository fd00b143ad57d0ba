"""What evaluations on tasks and prompts found, as it's printed and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        name: the task's.
        position: the state of the model.
        metric: lm-eval's name, such as ``acc_norm``; with the filter behind it (``exact_match,strict-match``) where a
            task has several.
        value: what lm-eval computed.
        stderr: its standard error; None where lm-eval has none.
        samples: how many documents.
        protocol: versions, shots and how it was computed, in words.
    """

    name: str
    position: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    protocol: str

    @property
    def line(self) -> str:
        """For the console."""
        return f"EVAL: {self.name} {self.metric} is {self.value:.4f} ({self.position})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``metrics.json``."""
        return {"kind": "lm_eval", **vars(self)}


@dataclass(frozen=True)
class Continued:
    """A prompt and what a model made of it, without the prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Generated:
    """What one state of the model made of a file of prompts.

    Attributes:
        name: as the configuration calls the prompts.
        position: the state of the model.
        samples: each prompt and its continuation.
        protocol: how it was computed, in words.
    """

    name: str
    position: str
    samples: tuple[Continued, ...]
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``metrics.json``. There is no number that says how good a text is: ``value`` is None."""
        samples = [vars(one) for one in self.samples]
        return {
            "kind": "generate_only",
            "name": self.name,
            "position": self.position,
            "value": None,
            "protocol": self.protocol,
            "samples": samples,
        }


def side_by_side(made: Sequence[Generated]) -> list[str]:
    """Lines that show, for each prompt, what every state made of it."""
    lines: list[str] = []
    by_prompts: dict[tuple[str, ...], list[Generated]] = {}
    for one in made:
        by_prompts.setdefault((one.name, *(sample.prompt for sample in one.samples)), []).append(one)
    for group in by_prompts.values():
        width = max(len(one.position) for one in group)
        for number, samples in enumerate(zip(*(one.samples for one in group), strict=True), 1):
            lines.append(f"PROMPT {number}: {samples[0].prompt!r}")
            lines += [f"  {one.position:<{width}}  {each.text!r}" for one, each in zip(group, samples, strict=True)]
    return lines
