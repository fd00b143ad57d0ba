"""Agreement with the original, measured in the pass: that of the two whole models in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, reload
from scipy.special import log_softmax, rel_entr
from test_pipeline import evaluation_windows

from llmc.eval.divergence import TokenAgreement

FAKE = "fake_quant_model"


@torch.no_grad()
def whole(folder: Path, case: Case) -> np.ndarray:
    """Logits ``[predicted tokens, vocabulary]`` of the whole model."""
    windows = evaluation_windows(case)
    return reload(folder).double()(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1).numpy()


def agreement(case: Case, positions: list[str]) -> list[TokenAgreement]:
    case.content["eval"] |= {"type": ["ppl", "token_acc"], "eval_pos": positions}
    return [one for one in case.compress().evaluations if isinstance(one, TokenAgreement)]


@pytest.mark.parametrize(
    ("family", "method", "bits"), [("llama", "RTN", 4), ("llama-tied", ["Quarot", "RTN"], 4), ("opt", "RTN", 3)]
)
def test_it_is_that_of_the_whole_models_in_float64(case, source_of, family, method, bits):
    weight = {"bit": bits, "symmetric": False, "granularity": "per_group", "group_size": 32}
    run = case(source_of(family), method, quant={"weight": weight}, save={"save_vllm": False})
    (found,) = agreement(run, ["fake_quant"])
    original, compressed = whole(run.source, run), whole(run.save_path / FAKE, run)
    p, q = (np.exp(log_softmax(logits, axis=1)) for logits in (original, compressed))
    kl = rel_entr(p, q).sum(axis=1)
    assert found.tokens == len(kl) == found.windows * (found.seq_len - 1)
    assert found.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl > 1e-3
    quantiles = {"0.5": np.quantile(kl, 0.5), "0.99": np.quantile(kl, 0.99), "max": kl.max()}
    assert found.kl_quantiles == pytest.approx(quantiles, rel=1e-3)
    best = original.argmax(axis=1)
    assert found.value == (compressed.argmax(axis=1) == best).mean()
    assert found.top5 == np.mean(
        [b in five for b, five in zip(best, np.argsort(-compressed, axis=1)[:, :5], strict=True)]
    )
    assert found.value < 1


def test_both_measures_share_the_text_and_the_original_needs_no_position(case, monkeypatch):
    from llmc.stream.engine import Engine

    seen: dict[str, Any] = {}
    real = Engine.run

    def watching(self: Engine) -> Any:
        seen.update(self._batches)
        return real(self)

    monkeypatch.setattr(Engine, "run", watching)
    run = case(save={"save_vllm": False, "save_fake": False})
    (found,) = agreement(run, ["fake_quant"])
    assert len(seen["eval"].batches) == found.windows
    assert seen["eval"].states == {"pretrain", "fake_quant"}


def test_a_model_that_is_not_changed_agrees_with_itself(case, exact):
    """In float32 the stored weights of a rotated and unrounded model differ from the original's in the last digits."""
    run = case(exact("llama"), "Quarot", save={"save_vllm": False})
    transformed, compressed = agreement(run, ["transformed", "fake_quant"])
    assert (transformed.value, transformed.top5) == (1.0, 1.0)
    assert 0 <= transformed.kl < 1e-9
    assert compressed.kl > 1e-3
