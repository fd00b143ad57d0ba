"""Write the tables of docs/backends.md: what each format makes of each scheme, by its own checks before a run.

Run it after a change to an exporter: ``python scripts/make_backends_table.py``. A test compares the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmc.configuring import load_config
from llmc.errors import ExportError
from llmc.export import EXPORTERS, Exporter, Layer
from llmc.models import Heads
from llmc.quant import Scheme
from llmc.translate import make_exporters, make_recipe_of
from llmc.translate_kv import make_kv

PAGE = Path(__file__).resolve().parents[1] / "docs" / "backends.md"
START, END = "<!-- made by scripts/make_backends_table.py -->", "<!-- end -->"
G128 = {"granularity": "per_group", "group_size": 128}
CHANNEL, TOKEN = {"granularity": "per_channel"}, {"granularity": "per_token"}
STATIC = {"granularity": "per_tensor", "static": True}


def weight(bit: int | str, /, *, symmetric: bool = True, **grain: Any) -> dict[str, Any]:
    return {"weight": {"bit": bit, "symmetric": symmetric, **grain}}


def both(bit: int | str, act: int | str, grain: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {**weight(bit, **grain), "act": {"bit": act, "symmetric": True, **inputs}}


def blocks(bit: str, act: str | None) -> dict[str, Any]:
    return {"weight": {"bit": bit}, **({} if act is None else {"act": {"bit": act}})}


SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16, groups of 128, symmetric": weight(4, **G128),
    "W4A16, groups of 128, zero points": weight(4, symmetric=False, **G128),
    "W4A16, groups of 32, symmetric": weight(4, granularity="per_group", group_size=32),
    "W4A16, a row, symmetric": weight(4, **CHANNEL),
    "W8A16, a row, symmetric": weight(8, **CHANNEL),
    "W3A16, groups of 128, symmetric": weight(3, **G128),
    "W2A16, groups of 128, zero points": weight(2, symmetric=False, **G128),
    "W8A8, a row, dynamic per token": both(8, 8, CHANNEL, TOKEN),
    "W8A8, a row, static per tensor": both(8, 8, CHANNEL, STATIC),
    "W4A8 (int8), groups of 128": both(4, 8, G128, TOKEN),
    "W4A8 (FP8), groups of 128": both(4, "e4m3", G128, STATIC),
    "FP8, a row, dynamic per token": both("e4m3", "e4m3", CHANNEL, TOKEN),
    "FP8, a tensor, static": both("e4m3", "e4m3", {"granularity": "per_tensor"}, STATIC),
    "FP8, blocks of 128": both("e4m3", "e4m3", {"granularity": "per_block", "block_size": 128}, G128),
    "NVFP4": blocks("nvfp4", "nvfp4"),
    "NVFP4, weights alone": blocks("nvfp4", None),
    "MXFP4, weights alone": blocks("mxfp4", None),
    "MXFP8": blocks("mxfp8", "mxfp8"),
    "FP8 KV cache, static": {
        **weight(4, **G128),
        "kvcache": {"method": "Naive", "bit": "e4m3", "symmetric": True, "granularity": "per_tensor", "static": True},
    },
}
PROVED = {
    "save_vllm": "compressed-tensors' own compression and decompression; Transformers' logits bit for bit; the real "
    "vLLM on a CPU for W4A16, W8A8, W4A8 and FP8 (plain torch stands in for integer products where a processor lacks "
    "AVX-512 and VNNI), and with the FP8 cache; compressed-tensors' own cache computes with its scales what was "
    "evaluated",
    "save_sgl": "the tensors are those of `save_vllm`; the table follows the loader's source, never run",
    "save_trtllm": "nvidia-modelopt's own export of the same model: names, dtypes, shapes, packed bytes; the loader's "
    "rules restated; never run",
    "save_autoawq": "compressed-tensors' converter, AutoAWQ's own unpacking, and the real vLLM on a CPU",
    "save_autogptq": "unpacking by hand and by llama.cpp's converter, and the real vLLM on a CPU",
    "save_mlcllm": "as AutoAWQ's layout; never run",
    "save_lightllm": "as AutoAWQ's layout; the FP8 reader of compressed-tensors; LightLLM's rule replayed; never run",
    "save_llamacpp": "the gguf package bit for bit; the real llama.cpp for all types but Q2_K and Q3_K",
    "save_fake": "Transformers' logits bit for bit",
}
LAYERS = (  # of a block: a model of 4096 channels with grouped queries
    (("self_attn.q_proj", 4096, 4096), ("self_attn.k_proj", 1024, 4096), ("self_attn.v_proj", 1024, 4096)),
    (("self_attn.o_proj", 4096, 4096),),
    (("mlp.gate_proj", 14336, 4096), ("mlp.up_proj", 14336, 4096)),
    (("mlp.down_proj", 4096, 14336),),
)


def layers(scheme: Scheme) -> list[Layer]:
    prefix = "model.layers.0."
    return [
        Layer(prefix + name, rows, columns, scheme.weight, tuple(prefix + one[0] for one in fused), act=scheme.act)
        for fused in LAYERS
        for name, rows, columns in fused
    ]


def judged(kind: type[Exporter], quant: Mapping[str, Any]) -> tuple[str, str]:
    """A cell, and the note that explains it."""
    content = {
        "model": {"path": "model", "torch_dtype": "auto"},
        "calib": {"name": "wikitext2", "n_samples": 1, "seq_len": 512, "preproc": "wikitext2_gptq", "bs": 1},
        "quant": {"method": "RTN", **quant},
        "save": {"save_path": "out", kind.name: True},
    }
    config = load_config(content).config
    try:
        recipe = make_recipe_of(config, torch.bfloat16, make_kv(config, Heads(32, 8, 128)))
        found = layers(recipe.scheme)
        (exporter,) = make_exporters(config, recipe, found, torch.bfloat16, torch.bfloat16)
        warnings = exporter.check(found)
    except ExportError as error:
        return "refused", str(error).splitlines()[0]  # without the remedy
    return ("accepted", "; ".join(warnings)) if warnings else ("exact", "")


def render() -> str:
    """Everything between the page's two marks."""
    kinds = [kind for kind in EXPORTERS if kind.stores_weights and not kind.transformed_only]
    lines = ['<div class="matrix" markdown="1">', ""]
    lines += [f"| | {' | '.join(f'`{kind.name}`' for kind in kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    notes: dict[str, list[str]] = {kind.name: [] for kind in kinds}
    for name, quant in SCHEMES.items():
        cells = []
        for kind in kinds:
            verdict, note = judged(kind, quant)
            cells.append(verdict if verdict != "refused" else "no")
            if note:
                notes[kind.name].append(f"{name}: {note}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "</div>",
        "",
        "**exact**: what is written is code for code what was evaluated. **accepted**: the same, and the run",
    ]
    lines += ["warns of what the backend needs or does otherwise. **no**: refused before a weight is read.", ""]
    for kind in kinds:
        lines += ['<details markdown="1">', f"<summary><code>{kind.name}</code>: {PROVED[kind.name]}</summary>", ""]
        lines += [f"- {note}" for note in notes[kind.name]] or ["- nothing to say"]
        lines += ["", "</details>", ""]
    return "\n".join(lines)


def page() -> str:
    """The whole page as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{render()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
