"""``quant.mix_bits`` with a budget: so many bits per weight, out of which every layer's scheme is chosen.

In the file ``budget``, ``candidates`` and ``from`` stand in ``quant.mix_bits``, beside settings with names; the schema
has them as a section of their own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from llmc.config import forms
from llmc.config.section import Section
from llmc.config.suggest import Document, Misfit, refuse_if
from llmc.config.tensors import WeightConfig

_KEYS = {"budget": "bits", "candidates": "candidates", "from": "losses"}
_HERE = "mix_bits"
_BITS = (2, 3, 4, 5, 6, 8)


class Candidate(Section):
    """A scheme to choose; what it doesn't say is as in quant.weight."""

    bit: forms.Bit = Field(description="Bits, 2..8, or e4m3, e2m1, mxfp4, mxfp8, nvfp4.")
    symmetric: bool | None = Field(None, description="Whether the grid is symmetric around zero.")
    granularity: Literal["per_group", "per_channel", "per_tensor"] | None = Field(
        None, description="Which weights share one scale."
    )
    group_size: forms.GroupSize = Field(None, ge=1, description="Elements in a group, for per_group.")


def _listed(value: object) -> object:
    """A YAML list as the schema wants it."""
    return tuple(value) if isinstance(value, list) else value


class BudgetConfig(Section):
    """A budget of bits; in the file its keys stand in quant.mix_bits."""

    bits: float | None = Field(
        None,
        gt=0,
        description="mix_bits.budget: bits per weight in the quantized layers, scales and zero points included.",
    )
    candidates: Annotated[tuple[Candidate, ...] | None, BeforeValidator(_listed)] = Field(
        None,
        description="mix_bits.candidates: the schemes to choose from; none: quant.weight with 2, 3, 4, 5, 6 and 8 "
        "bits, and 8 symmetric ones, as far as the formats to be saved have them.",
    )
    losses: str | None = Field(
        None, min_length=1, description="mix_bits.from: the sensitivity.json to choose by; none: measured first."
    )


def gather_budget(document: Document) -> None:
    """Move what says of a budget in ``quant.mix_bits`` to its section, in place."""
    quant = document.data.get("quant")
    settings = quant.get("mix_bits") if isinstance(quant, dict) else None
    if not isinstance(quant, dict) or not isinstance(settings, dict):
        return
    asked = {key for key in _KEYS if key in settings and not isinstance(settings[key], dict)}
    if not asked:
        return
    if "budget" not in asked:
        document.problem(("quant", "mix_bits", min(asked)), "goes with a budget; add quant.mix_bits.budget: 4.25")
    if quant.get("bit_budget") is not None:
        document.problem(("quant", "bit_budget"), "stands there and in quant.mix_bits; keep one of them")
    quant["bit_budget"] = {_KEYS[key]: settings.pop(key) for key in sorted(asked)}
    document.move(("quant", "bit_budget"), ("quant", "mix_bits"))
    for key in asked:
        document.move(("quant", "bit_budget", _KEYS[key]), ("quant", "mix_bits", key))


def candidate_weights(weight: WeightConfig, candidates: tuple[Candidate, ...] | None) -> tuple[WeightConfig, ...]:
    """The candidates as whole sections.

    Args:
        weight: ``quant.weight``.
        candidates: what was asked for; None: the usual bits.

    Raises:
        Misfit: one isn't a scheme, two are the same, or there are no usual ones.
    """
    usual = weight.quant_type == "int-quant" and weight.granularity in ("per_group", "per_channel", "per_tensor")
    few = candidates is not None and len(candidates) < 2
    refuse_if(few, _HERE, "candidates: at least two are needed to choose from")
    bare = candidates is None and not usual
    refuse_if(bare, _HERE, f"candidates: missing; quant.weight has bit {weight.bit} and {weight.granularity}")
    asked = candidates or tuple(Candidate.model_validate({"bit": bit}) for bit in _BITS)
    if candidates is None and not weight.symmetric:  # vLLM has no kernel for 8 bits with zero points
        asked += (Candidate.model_validate({"bit": 8, "symmetric": True}),)
    found: list[WeightConfig] = []
    for index, candidate in enumerate(asked):
        section = _section(index, weight, candidate)
        twice = section in found
        refuse_if(twice, _HERE, f"candidates: entry {index} is the same as an earlier one")
        found.append(section)
    return tuple(found)


def _section(index: int, weight: WeightConfig, candidate: Candidate) -> WeightConfig:
    """A candidate laid over ``quant.weight``."""
    try:
        return WeightConfig.model_validate(_laid_over(weight.model_dump(mode="json"), candidate))
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        cause = found.get("ctx", {}).get("error")
        key = cause.key if isinstance(cause, Misfit) else ".".join(map(str, found["loc"]))
        raise Misfit(_HERE, f"candidates: entry {index}, {key}: {cause or found['msg']}") from error


def _laid_over(weight: dict[str, Any], candidate: Candidate) -> dict[str, Any]:
    own = candidate.model_dump(exclude_none=True)
    if "group_size" in own:
        own = {"granularity": "per_group", **own}
    elif own.get("granularity", "per_group") != "per_group":
        own["group_size"] = None
    if isinstance(candidate.bit, str):
        own = {"quant_type": "float-quant", "symmetric": True, "scale_digits": None, "sym_mode": "restricted", **own}
        if candidate.bit in forms.MICRO_GROUPS:
            own = {"granularity": "per_group", "group_size": forms.MICRO_GROUPS[candidate.bit], **own}
    else:
        own["quant_type"] = "int-quant"
    if own.get("symmetric") is False:
        own["sym_mode"] = "restricted"
    return {**weight, **own}
