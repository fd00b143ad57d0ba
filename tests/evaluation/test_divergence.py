"""Divergence and agreement of logits, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from llmc.eval.divergence import Divergence, divergence, ranks
from llmc.eval.measure import Chunk, Text, Watch
from llmc.eval.perplexity import CrossEntropy
from llmc.report.evaluations import facts, line

TEXT = Text("text", "by hand", "0" * 64, 1, 4)


def random_logits(*shape: int, seed: int, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_divergence_is_scipys_in_float64():
    p, q = random_logits(50, 1000, seed=1), random_logits(50, 1000, seed=2)
    exact = [np.exp(log_softmax(one.double().numpy(), axis=1)) for one in (p, q)]
    found = divergence(p, q)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), rel_entr(*exact).sum(axis=1), rtol=1e-12)
    small = divergence(p, p + 1e-3 * q)  # where differences of logarithms cancel
    exact[1] = np.exp(log_softmax((p + 1e-3 * q).double().numpy(), axis=1))
    np.testing.assert_allclose(small.numpy(), rel_entr(*exact).sum(axis=1), rtol=1e-9, atol=1e-14)
    assert not divergence(p, p).any()


def test_tokens_that_the_original_never_says_add_nothing():
    p, q = torch.tensor([0.0, 0.0, -torch.inf]), torch.tensor([0.0, 0.0, 0.0])
    assert float(divergence(p, q)) == pytest.approx(np.log(1.5), rel=1e-6)
    assert float(divergence(p, p)) == 0.0
    assert float(divergence(q, p)) == np.inf


def test_ranks_count_what_is_likelier():
    original = torch.tensor([[0.0, 3.0, 1.0], [5.0, 1.0, 2.0], [0.0, 0.0, 9.0]])
    model = torch.tensor([[0.0, 3.0, 1.0], [1.0, 4.0, 2.0], [7.0, 0.0, 1.0]])
    assert ranks(original, model).tolist() == [0, 2, 1]


def test_a_result_puts_chunks_together():
    tokens = torch.arange(10)[None].repeat(2, 1)
    original, logits = random_logits(2, 9, 40, seed=3), random_logits(2, 9, 40, seed=4)
    logits = original + torch.tensor([0.01, 0.8, 3.0] * 3)[:, None] * logits  # alike, somewhat, and hardly
    whole, parts = Divergence(), Divergence()
    whole.see(Chunk("fake_quant", 0, 0, tokens, logits, original))
    for start in (0, 4, 8):
        chunk = slice(start, start + 4)
        parts.see(Chunk("fake_quant", 0, start, tokens, logits[:, chunk], original[:, chunk]))
    found = parts.result("token_acc", TEXT, "fake_quant_wo_kv", "fake_quant")
    same = original.argmax(-1) == logits.argmax(-1)
    near = (logits.topk(5).indices == original.argmax(-1, keepdim=True)).any(-1)
    assert (found.value, found.top5, found.tokens) == (float(same.double().mean()), float(near.double().mean()), 18)
    assert 6 / 18 <= found.value < found.top5 < 1
    each = np.sort(whole.divergences("fake_quant").numpy())
    np.testing.assert_array_equal(np.sort(parts.divergences("fake_quant").numpy()), each)
    assert found.kl == pytest.approx(each.mean(), rel=1e-12)
    expected = {"0.5": np.quantile(each, 0.5), "0.99": np.quantile(each, 0.99), "max": each[-1]}
    assert found.kl_quantiles == pytest.approx(expected, rel=1e-12)
    assert found.position == "fake_quant_wo_kv"
    assert line(found).startswith(f"EVAL: token_acc on text is {found.value:.4f} (fake_quant_wo_kv: top-5 ")
    assert line(found).endswith("; by hand)")
    assert f"{found.value:.2%} of the best tokens" in facts([found])["like the original (fake_quant_wo_kv)"]


def test_cross_entropies_are_the_same_in_chunks_and_at_once():
    tokens, logits = torch.arange(10)[None].repeat(2, 1), random_logits(2, 9, 40, seed=5)
    whole, parts = CrossEntropy(), CrossEntropy()
    whole.see(Chunk("pretrain", 0, 0, tokens, logits))
    for start in (0, 4, 8):
        parts.see(Chunk("pretrain", 0, start, tokens, logits[:, start : start + 4]))
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    for measure in (whole, parts):
        torch.testing.assert_close(measure.losses("pretrain")[0], expected)
    assert parts.result("ppl", TEXT, "pretrain", "pretrain") == whole.result("ppl", TEXT, "pretrain", "pretrain")


def test_a_comparison_needs_the_original():
    with pytest.raises(ValueError, match="original's logits"):
        Divergence().see(Chunk("fake_quant", 0, 0, torch.zeros(1, 2), torch.zeros(1, 1, 3)))
    assert Watch(Divergence(), range(1), frozenset({"fake_quant"})).streams == {"pretrain", "fake_quant"}
    assert Watch(Divergence(), range(1)).streams == frozenset()
    assert Watch(CrossEntropy(), range(1), frozenset({"fake_quant"})).streams == {"fake_quant"}
