"""What a run is, in plain values, for those who compare its numbers."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from . import __version__
from .plan import original_bytes
from .prepare import Prepared
from .quant import Scheme
from .report.metrics import About
from .translate import mixed_schemes


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "scikit-learn", "scipy")
    return {"llmc": __version__, **{name: version(name) for name in packages}}


def describe(prepared: Prepared) -> About:
    """What is known of a run before it begins."""
    recipe = prepared.recipe
    act = recipe.act or recipe.clustered
    return About(
        config=prepared.loaded.resolved,
        versions=versions(),
        model=_model(prepared),
        scheme=None if recipe.spec is None else recipe.spec.to_dict(),
        sparsity=None if recipe.sparsity is None else asdict(recipe.sparsity),
        activations=None if act is None else act.to_dict(),
        mixed=_mixed(prepared),
        kv_scheme=_kv_scheme(prepared),
        calibration_tokens=sum(batch.tokens.numel() for batch in prepared.calib),
    )


def _model(prepared: Prepared) -> dict[str, Any]:
    return {
        "path": str(prepared.folder),
        "adapter": prepared.adapter.name,
        "blocks": len(prepared.skeleton.blocks),
        "bytes": original_bytes(prepared.checkpoint),
        "input": prepared.checkpoint.says or None,
        "computing_dtype": str(prepared.skeleton.model.dtype).removeprefix("torch."),
        "device": str(prepared.device),
    }


def _kv_scheme(prepared: Prepared) -> dict[str, Any] | None:
    """The KV cache's grid with the bits that an element takes in it, scales included."""
    kv = prepared.recipe.kv
    if kv is None:
        return None
    return kv.to_dict() | {"bits_per_element": kv.bits_an_element(prepared.heads.kv, prepared.heads.dim)}


def _mixed(prepared: Prepared) -> list[dict[str, Any]]:
    """The schemes of ``quant.mix_bits`` with the Linears that they were used for."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in mixed_schemes(prepared.recipe, prepared.layers).items():
        by_scheme.setdefault(scheme, []).append(name)
    return [{**scheme.to_dict(), "layers": names} for scheme, names in by_scheme.items()]
