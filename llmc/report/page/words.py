"""Numbers and schemes as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MISSING = "–"


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; tiny and huge ones with an exponent."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return _plain(value, digits)
    return f"{value:.{max(digits - 2, 1)}e}".replace("e-0", "e-").replace("e+0", "e+")


def _plain(value: float, digits: int) -> str:
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    leading = 0 if abs(value) >= 0.1 else 1 if abs(value) >= 0.01 else 2
    return f"{value:,.{max(digits - whole + leading, 0)}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def change(before: float, after: float) -> str:
    """By how much a number rose or fell, with its sign."""
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "\N{MINUS SIGN}") if before else MISSING


_SHARED = {
    "PerTensor": "one scale a tensor",
    "PerChannel": "one scale an output channel",
    "PerToken": "one scale a token",
    "PerHead": "one scale a head",
}
_FLOATS = {"e4m3": "FP8 (E4M3)", "e5m2": "FP8 (E5M2)", "e2m1": "FP4 (E2M1)"}


def shared(granularity: Mapping[str, Any]) -> str:
    """Which values share a scale."""
    kind = granularity["kind"]
    if kind in ("PerGroup", "PerBlock"):
        size = granularity["size"]
        return f"groups of {size}" if kind == "PerGroup" else f"blocks of {size} × {size}"
    if kind == "PerCluster":
        return "one scale a cluster of channels"
    return _SHARED.get(kind, str(kind))


def grid(spec: Mapping[str, Any]) -> str:
    """A grid in words: ``4-bit integers, asymmetric, groups of 64``."""
    floating = spec.get("grid", "int") != "int"
    kind = _FLOATS.get(spec["grid"], spec["grid"]) if floating else f"{spec['bits']}-bit integers"
    parts = [kind, *([] if floating else ["symmetric" if spec["symmetric"] else "asymmetric"])]
    parts.append(shared(spec["granularity"]))
    if spec.get("scale_dtype") in ("float8_e8m0fnu", "float8_e4m3fn"):
        parts.append("scales of 8 bits")
    if "static" in spec:
        parts.append("static" if spec["static"] else "dynamic")
    return ", ".join(parts)


def cache(spec: Mapping[str, Any]) -> str:
    """A KV cache's grid in words."""
    bits = spec.get("bits_per_element")
    return "quantized" if bits is None else f"{number(bits, 3)} bits a key or value"


def pruned(sparsity: Mapping[str, Any]) -> str:
    """How much is pruned, and how."""
    pattern = sparsity.get("pattern")
    ratio = sparsity.get("ratio") if sparsity.get("ratio") is not None else sparsity.get("mean")
    where = f"{pattern[0]} of each {pattern[1]}" if pattern else "anywhere in the layer"
    return f"{percent(ratio, 0)} zeros, {where}"


def plural(count: int, what: str) -> str:
    """``1 block``, ``3 blocks``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
