"""Log-likelihoods from chunks of padded batches against the whole model, one text at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from own_tasks import whole_logits

from llmc.errors import DataError
from llmc.eval.scoring import LENGTH_STEP, Continuation, padded, score

LIMIT = 64


def alone(model, one):
    """By the definition: one text, no padding, the whole of its logits in float64."""
    logits = model(input_ids=torch.tensor([one.inputs])).logits[0].double()
    predicted = logits.log_softmax(-1)[-len(one.targets) :]
    total = sum(float(predicted[i, token]) for i, token in enumerate(one.targets))
    return total, all(int(predicted[i].argmax()) == token for i, token in enumerate(one.targets))


def some(tokens, model):
    text = tokens(1, 60)[0].tolist()
    made = [Continuation.of(text[:n], text[n : n + m], LIMIT) for n, m in ((3, 4), (17, 1), (1, 9), (40, 20), (33, 2))]
    made += [Continuation.of(text[:17], [token], LIMIT) for token in (5, 6)]  # the input of another
    best = int(model(input_ids=torch.tensor([text[:9]])).logits[0, -1].argmax())
    return [*made, Continuation.of(text[:9], [best], LIMIT)]


@pytest.mark.parametrize(
    ("batch_size", "chunk", "by_itself"), [(1, 99, False), (3, 5, False), (8, 32, False), (3, 7, True)]
)
def test_equals_each_text_by_itself(model, tokens, batch_size, chunk, by_itself):
    wanted = some(tokens, model)
    found = score(wanted, whole_logits(model, chunk), LIMIT, batch_size=batch_size, alone=by_itself)
    for one in wanted:
        total, greedy = alone(model, one)
        assert found[one].total == pytest.approx(total, abs=2e-5)
        assert found[one].greedy == greedy
    assert [found[one].greedy for one in wanted].count(True) == 1


def test_an_input_is_read_once_and_a_batch_is_no_longer_than_it_must_be(model, tokens):
    seen = []

    def logits(batches, visit):
        seen.extend(batches)
        whole_logits(model)(batches, visit)

    wanted = some(tokens, model)
    score(wanted, logits, LIMIT, batch_size=2)
    assert sum(map(len, seen)) == len({one.inputs for one in wanted}) == len(wanted) - 3
    assert all(batch.shape[1] in (LENGTH_STEP, 2 * LENGTH_STEP) for batch in seen)
    assert [batch.shape[1] for batch in seen] == sorted((batch.shape[1] for batch in seen), reverse=True)


def test_padding_stops_at_the_limit():
    assert padded([[1] * 33, [2]], limit=50).shape == (2, 50)
    assert padded([[1] * 33, [2]], limit=500).tolist() == [[1] * 33 + [0] * 31, [2] + [0] * 63]
    assert padded([[1] * 33], limit=500, step=1).shape == (1, 33)


def test_a_long_context_loses_its_beginning():
    one = Continuation.of(list(range(10)), [90, 91], limit=4)
    assert one.inputs == (7, 8, 9, 90) and one.targets == (90, 91) and one.first == 2


def test_an_answer_longer_than_the_context_is_refused():
    with pytest.raises(DataError, match=r"an answer of 5 tokens.*at most 4"):
        Continuation.of([1], [1, 2, 3, 4, 5], limit=4)
