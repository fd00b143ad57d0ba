"""Tasks asked of a real HTTP server, against the same model's own logits; and servers that can't answer."""

from __future__ import annotations

from functools import partial

import pytest
from completions import NAME, Backend, serving
from own_tasks import whole_logits
from transformers import AutoTokenizer

from llmc.config.suggest import did_you_mean
from llmc.errors import ConfigError, RunError
from llmc.eval.greedy import greedy_whole
from llmc.eval.harness import TaskOptions, find_tasks
from llmc.eval.scoring import score
from llmc.eval.server import Server, import_api

LIMIT = 64


@pytest.fixture
def backend(folder, model):
    return Backend(model, AutoTokenizer.from_pretrained(folder))


def test_a_server_gives_the_scores_of_its_model(folder, model, own_tasks, backend):
    from llmc.eval.streamed_lm import StreamedLM

    tasks = find_tasks(["own_choices", "own_writing"], str(own_tasks), TaskOptions(limit=5), did_you_mean)
    with serving(backend) as url:
        server = Server.find(f"{url}/", None)
        assert server == Server(url, NAME)
        server.check_logprobs(5)
        lm = server.lm(folder, LIMIT, 2, adds_begin=False)
        found = tasks.evaluate(lm, "fake_quant", "on a server")
        told = [one.resps for one in tasks.instances()]
    ask = partial(score, logits=whole_logits(model), limit=LIMIT, batch_size=1)
    written = [resp for one, resp in zip(tasks.instances(), told, strict=True) if one.request_type == "generate_until"]
    own = StreamedLM(backend.tokenizer, LIMIT, ask, lambda requests: [one[0] for one in written], tasks.instances)
    assert tasks.evaluate(own, "fake_quant", "on a server") == found
    for one, other in zip((one.resps for one in tasks.instances()), told, strict=True):
        if isinstance(other[0], tuple):
            assert one[0] == (pytest.approx(other[0][0], abs=2e-5), other[0][1])
    assert {asked["model"] for asked in backend.asked} == {NAME}
    prompts = [one.args[0] for one in tasks.instances() if one.request_type == "generate_until"]
    ids = [tuple(backend.tokenizer(text).input_ids) for text in prompts]
    whole = [backend.tokenizer.decode(new).partition("w7")[0] for new in greedy_whole(ids, model, 6, ())]
    assert [text for (text,) in written] == whole and any(whole)


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(RunError, match=r"nothing that is understood answers at http://127.0.0.1:9/v1/models"):
        Server.find("http://127.0.0.1:9/v1", None)


def test_a_server_without_the_model_is_named(backend):
    with serving(backend) as url, pytest.raises(RunError, match=f"it doesn't have 'other'.*has {NAME}"):
        Server.find(url, "other")


@pytest.mark.parametrize(("flaw", "said"), [("silent", "TypeError"), ("failing", "answers 500")])
def test_a_server_without_log_probabilities_is_named(backend, flaw, said):
    backend.logprobs, backend.fails = flaw != "silent", flaw == "failing"
    with serving(backend) as url, pytest.raises(RunError, match="gives no log-probabilities") as caught:
        Server.find(url, NAME).check_logprobs(5)
    assert said in str(caught.value)


def test_what_asking_needs_is_named(monkeypatch):
    from llmc.eval import server

    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="isn't installed") as caught:
        import_api()
    assert "pip install 'llmc[eval]'" in str(caught.value)
