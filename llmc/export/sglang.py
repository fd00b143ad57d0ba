"""compressed-tensors for SGLang: the tensors of vLLM's folder, and fewer schemes.

Rules are those of SGLang 0.5's own loader. It has one format for a whole model, ignores ``transform_config``, and its
int8 kernel finds a symmetric scale per token whatever the file says of the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ExportError
from ..quant import PerToken, Scheme
from .vllm import VLLM
from .vllm_schemes import FLOAT, INTEGER, NVFP4, PACKED, format_of

_NEAREST = {
    PACKED: "weight {bit: 4, granularity: per_group, group_size: 128}, or {bit: 8, symmetric: True}, without act",
    INTEGER: "weight {bit: 8, symmetric: True, per_channel} with act {bit: 8, symmetric: True, granularity: per_token}",
    FLOAT: "weight {bit: e4m3, granularity: per_channel} with act {bit: e4m3, granularity: per_token}",
    NVFP4: "weight {bit: nvfp4} with act {bit: nvfp4}",
}


class SGLang(VLLM):
    """W4A16 and W8A16, dynamic symmetric W8A8, FP8, NVFP4 with its activations; and a static FP8 KV cache."""

    name = "save_sgl"
    folder = "sgl_quant_model"
    backend = "SGLang"
    carries_images = False
    runs_rotations = False

    def check_schemes(self, schemes: Sequence[Scheme]) -> None:
        """SGLang's own table."""
        for scheme in schemes:
            if not _loads(scheme):
                raise _refusal(scheme)
        formats = {format_of(scheme.weight, scheme.act) for scheme in schemes if scheme.weight is not None}
        if len(formats) > 1:
            raise ExportError(
                f"quant.mix_bits: SGLang reads one format for all layers, not {' and '.join(sorted(formats))} "
                "(save_sgl)",
                "give all layers weights alone, or all of them activations of the same kind; or write save_vllm",
            )

    def conditions(self, schemes: Sequence[Scheme]) -> list[str]:
        """NVFP4's kernel is Blackwell's."""
        blackwell = any(scheme.weight is not None and scheme.weight.is_nvfp4 for scheme in schemes)
        return ["save_sgl: SGLang runs NVFP4 on Blackwell GPUs"] if blackwell else []

    def serve(self, folder: Path) -> str:
        """SGLang's server, which must be told of an FP8 cache."""
        cache = "" if self.kv is None else " --kv-cache-dtype fp8_e4m3"
        return f"python -m sglang.launch_server --model-path {folder}{cache}"


def _loads(scheme: Scheme) -> bool:
    """Whether SGLang runs a scheme as it is evaluated, of those that vLLM loads."""
    spec, act = scheme.weight, scheme.act
    if spec is None:
        return True
    try:
        stored = format_of(spec, act)
    except ExportError:
        return False
    if stored == PACKED:
        return act is None and spec.bits in (4, 8)
    if stored == INTEGER:
        dynamic = act is not None and isinstance(act.grid.granularity, PerToken) and act.grid.symmetric
        return dynamic and spec.bits == 8
    return stored == FLOAT or (stored == NVFP4 and act is not None)


def _refusal(scheme: Scheme) -> ExportError:
    spec, act = scheme.weight, scheme.act
    kind = FLOAT
    if spec is not None and spec.grid == "int":
        kind = PACKED if act is None else INTEGER
    elif spec is not None and spec.grid == "e2m1":
        kind = NVFP4
    return ExportError(
        f"SGLang doesn't run {scheme.describe()} as it is evaluated (save_sgl)",
        f"the nearest that it does: {_NEAREST[kind]}; or write save_vllm if it takes the scheme, or save_fake",
    )
