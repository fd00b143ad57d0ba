"""Mixtures whose checkpoints hold the matrices of all experts in one tensor: read as Linears, written as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cases import write_tokenizer
from families import FUSED
from safetensors.torch import load_file
from test_mixture_runs import logits, measured, perplexity, tensors_of, windows_of
from tiny import Tiny, recorded, write_checkpoint

from llmc.verify import verify

RUNS = {
    "RTN": {},
    "GPTQ": {},
    "Awq": {},
    "SmoothQuant": {
        "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"},
        "act": {"bit": 8, "symmetric": True, "granularity": "per_token"},
    },
}


@pytest.fixture(scope="module", params=FUSED)
def fused(request, tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(FUSED[request.param], folder)
    return Tiny(request.param, folder)


@pytest.fixture(scope="module")
def fused_source(fused, tmp_path_factory) -> Path:
    """With a tokenizer."""
    folder = shutil.copytree(fused.folder, tmp_path_factory.mktemp("source") / fused.name)
    write_tokenizer(folder)
    return folder


def test_the_model_computes_what_transformers_does(fused):
    """Products of ``[in, out]`` matrices are added up in another order than those of Linears."""
    ids = torch.randint(3, 190, (2, 20), generator=torch.Generator().manual_seed(0))
    skeleton, model = fused.loaded(), fused.model()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids, use_cache=False).logits for one in (skeleton.model, model))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_replaying_the_blocks_equals_the_whole_forward_bit_for_bit(fused):
    ids = torch.randint(3, 190, (2, 20), generator=torch.Generator().manual_seed(0))
    skeleton = fused.loaded()
    outputs = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in skeleton.blocks
    ]
    skeleton.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    seen = recorded(skeleton, ids)
    hidden = seen.hidden
    for block, call, expected in zip(skeleton.blocks, seen.calls, outputs, strict=True):
        hidden = call(block, hidden)
        assert torch.equal(hidden, expected)


@pytest.mark.parametrize("method", RUNS)
def test_what_is_written_is_what_was_evaluated(case, fused_source, method):
    made = case(fused_source, method, quant=RUNS[method], save={"save_fake": True, "save_vllm": True})
    result = made.compress()
    fake = made.save_path / "fake_quant_model"
    assert tensors_of(fake).keys() == tensors_of(fused_source).keys()
    assert all(part.is_contiguous() for part in tensors_of(fake).values())
    found = measured(result)
    assert found["fake_quant"] != pytest.approx(found["pretrain"], rel=1e-4)
    if method != "SmoothQuant":
        windows = windows_of(made)
        assert found["fake_quant"] == pytest.approx(perplexity(logits(fake, windows), windows), rel=1e-4)
    names = {name for file in (made.save_path / "vllm_quant_model").glob("*.safetensors") for name in load_file(file)}
    singles = [name for name in names if ".experts.3.gate_proj.weight" in name]
    assert singles and not any(name.endswith("experts.gate_up_proj") for name in names)
    assert verify(fake).findings == []
