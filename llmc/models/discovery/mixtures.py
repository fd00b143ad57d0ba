"""The last Linears of a mixture's experts: whether a Linear of the same expert can absorb a scale of what they read."""

from __future__ import annotations

from typing import Any

from ...errors import ModelError
from ..adapter import Heads, Space, Subset
from ..experts import LinearExperts
from ..mixture import last_linears, split
from .calls import LONG
from .producers import fold_problem
from .trial import Run, Trial

_ABSORBERS = ("up_proj", "gate_proj")
_TRIED = 8  # experts: all of them run the same code


def subset_of_experts(trial: Trial, long: Run, path: str, writes: Space | None) -> tuple[Subset, str | None]:
    """The last Linears of the experts that ``path`` holds, and why nothing can absorb a scale, if nothing can.

    A scale is really folded into experts that get tokens, one after the other.

    Raises:
        ModelError: none gets any.
    """
    experts = long.seen[path].module
    if not isinstance(experts, LinearExperts):
        raise TypeError(f"a {type(experts).__name__} isn't a layer of experts as Linears")
    busy = _busy(trial, experts)[:_TRIED]
    if not busy:
        raise ModelError(f"no token is routed to any expert of {path}", "it needs an adapter of its own")
    reasons: list[str] = []
    for leaf in _ABSORBERS:
        claimed = last_linears(path, experts.count, leaf, writes)
        shares = split(claimed)
        problem = next(
            (found for i in busy if (found := fold_problem(trial, shares[i], Heads(1, 1, 1), long.output))), None
        )
        if problem is None:
            return claimed, None
        reasons.append(leaf)
    reason = f"what stands between {' and '.join(reversed(reasons))} and it doesn't keep a scale of either"
    return last_linears(path, experts.count, None, writes), reason


def _busy(trial: Trial, experts: LinearExperts) -> list[int]:
    """Numbers of the experts that get tokens."""
    found: list[int] = []

    def hook(module: Any, args: Any) -> None:
        found.extend(index for index in range(experts.count) if args[0].tokens(index))

    handle = experts.entrance.register_forward_pre_hook(hook)
    try:
        trial.output(LONG)
    finally:
        handle.remove()
    return found
