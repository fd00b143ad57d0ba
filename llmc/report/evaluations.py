"""Results of evaluations in words."""

from __future__ import annotations

from collections.abc import Iterable

from ..eval.divergence import TokenAgreement
from ..eval.measure import Evaluated
from ..eval.perplexity import Perplexity


def line(one: Evaluated) -> str:
    """The line that people search logs for."""
    how = f"{one.details()}; {one.protocol}" if one.details() else one.protocol
    return f"EVAL: {one.kind} on {one.name} is {one.value:.4f} ({one.position}: {how})"


def facts(evaluated: Iterable[Evaluated]) -> dict[str, str]:
    """Rows of the summary. A row is a measure of one state of the model, whatever texts it was taken on."""
    found: dict[str, list[str]] = {}
    for one in evaluated:
        if isinstance(one, Perplexity):
            decoded = ", by decoding" if one.kind == "decode_ppl" else ""
            about = f"{one.value:.4f} on {one.name}, {one.windows} windows of {one.seq_len}"
            found.setdefault(f"perplexity ({one.position}{decoded})", []).append(about)
        elif isinstance(one, TokenAgreement):
            about = f"{one.value:.2%} of the best tokens, KL {one.kl:.3g} nats, on {one.name}"
            found.setdefault(f"like the original ({one.position})", []).append(about)
    return {row: "; ".join(said) for row, said in found.items()}
