"""Tasks and prompts in the configuration of a run: asked of what it wrote, and answered as by the whole model."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
from cases import reload
from completions import Backend, serving
from own_tasks import whole_logits, write_own_tasks
from transformers import AutoTokenizer

from llmc.cli import main
from llmc.config import load_config
from llmc.config.suggest import did_you_mean
from llmc.errors import ConfigError, DataError, RunError
from llmc.eval.greedy import greedy_whole
from llmc.eval.harness import TaskOptions, find_tasks
from llmc.eval.scoring import score
from llmc.prepare import prepare

LIMIT = 64
W8A8 = {
    "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"},
    "act": {"bit": 8, "symmetric": True, "granularity": "per_token"},
}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_own_tasks(tmp_path_factory.mktemp("own") / "tasks")


@pytest.fixture
def asking(own):
    """A section of tasks."""

    def make(**changes):
        section = {"type": "lm_eval", "tasks": ["own_both"], "path": str(own), "bs": 3, "limit": 6}
        return section | {"eval_pos": ["pretrain", "fake_quant"]} | changes

    return make


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "w1 w2 w3", "completion": "w4"}, {"question": "w9 w8"}, {"prompt": "w100"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"type": "generate_only", "path": str(file), "max_new_tokens": 5, "eval_pos": ["pretrain", "fake_quant"]}


def answered(folder, own, names, options):
    """The scores of the whole model in a folder."""
    from llmc.eval.streamed_lm import StreamedLM

    tasks = find_tasks(names, str(own), options, did_you_mean)
    ask = partial(score, logits=whole_logits(reload(folder)), limit=LIMIT, batch_size=1, alone=True)
    lm = StreamedLM(AutoTokenizer.from_pretrained(folder), LIMIT, ask, lambda requests: [], tasks.instances)
    return {(one.name, one.metric): one.value for one in tasks.evaluate(lm, "", "")}


def test_tasks_in_a_run_are_those_of_its_folder(case, asking, own, capsys):
    run = case(eval=[asking()])
    assert main(run.arguments) == 0
    shown = capsys.readouterr().out
    metrics = json.loads((run.save_path / "metrics.json").read_text())
    entries = {(one["position"], one["name"], one["metric"]): one for one in metrics["evaluation"]}
    folders = {"pretrain": run.source, "fake_quant": run.save_path / "fake_quant_model"}
    for position, folder in folders.items():
        wanted = answered(folder, own, ["own_both"], TaskOptions(limit=6))
        assert wanted.keys() == {
            ("own_choices", "acc"),
            ("own_choices", "acc_norm"),
            ("own_rolling", "word_perplexity"),
        }
        for (name, metric), value in wanted.items():
            entry = entries[position, name, metric]
            assert entry["value"] == pytest.approx(value, rel=1e-5)
            assert entry["kind"] == "lm_eval" and entry["samples"] == {"own_choices": 6, "own_rolling": 5}[name]
            assert f"EVAL: {name} {metric} is {entry['value']:.4f} ({position})" in shown
    assert len(entries) == 6 and metrics["schema"] == 2
    rolling = [entries[position, "own_rolling", "word_perplexity"]["value"] for position in folders]
    assert rolling[0] != rolling[1]


def test_a_finished_run_is_asked_what_it_was_not(case, asking, prompts, capsys):
    run = case(eval=[asking(tasks=["own_choices"]), prompts])
    answers = [one.to_dict() for one in run.compress().answers]
    file = run.save_path / "metrics.json"
    whole = json.loads(file.read_text())
    assert whole["evaluation"] == answers and len(answers) == 6
    file.write_text(json.dumps(whole | {"evaluation": answers[:1]}))
    capsys.readouterr()
    assert main(["eval", *run.arguments]) == 0
    assert json.loads(file.read_text()) == whole
    shown = capsys.readouterr().out
    assert f"EVAL: own_choices acc_norm is {answers[3]['value']:.4f} (fake_quant)" in shown
    texts = {one["position"]: one["samples"][0]["text"] for one in answers[4:]}
    lines = [f"  {position:<10}  {text!r}" for position, text in texts.items()]
    assert "\n".join(["PROMPT 1: 'w1 w2 w3'", *lines]) in shown


def test_text_is_continued_as_by_the_whole_model(case, prompts, capsys):
    run = case(eval=[prompts])
    result = run.compress()
    tokenizer = AutoTokenizer.from_pretrained(run.source)
    shown = ["w1 w2 w3", "w9 w8", "w100"]
    ids = [tuple(tokenizer(text).input_ids) for text in shown]
    for folder, made in zip((run.source, run.save_path / "fake_quant_model"), result.answers, strict=True):
        wanted = [tokenizer.decode(new) for new in greedy_whole(ids, reload(folder), 5, ())]
        assert [(one.prompt, one.text) for one in made.samples] == list(zip(shown, wanted, strict=True))
    assert json.loads((run.save_path / "metrics.json").read_text())["evaluation"] == [
        one.to_dict() for one in result.answers
    ]
    first = result.answers[1].to_dict()
    assert first["kind"] == "generate_only" and first["samples"][0].keys() == {"prompt", "text"}


def test_rounded_inputs_are_streamed_and_so_is_their_text(case, asking, prompts, own, monkeypatch):
    """No folder rounds inputs: what is asked is the model that was evaluated, not the one in the folder."""
    run = case(quant=W8A8, eval=[asking(tasks=["own_rolling"]), prompts], save={"save_vllm": False})
    prepared = prepare(load_config(run.content, ()))
    assert any("generate_only (fake_quant): activations are rounded" in line for line in prepared.warnings)
    result = run.compress()
    scores = {one.position: one.value for one in result.answers if one.to_dict()["kind"] == "lm_eval"}
    plain = answered(run.save_path / "fake_quant_model", own, ["own_rolling"], TaskOptions(limit=6))
    assert scores["fake_quant"] != pytest.approx(plain["own_rolling", "word_perplexity"], rel=1e-6)
    assert scores["fake_quant"] == pytest.approx(scores["pretrain"], rel=0.05)
    assert [len(one.samples) for one in result.answers[2:]] == [3, 3]


def test_a_scale_for_a_whole_input_is_that_of_one_request(case, asking):
    """Beside others, and behind padding, a request would be rounded otherwise."""
    quant = {**W8A8, "act": {**W8A8["act"], "bit": 4, "granularity": "per_tensor"}}
    section = asking(tasks=["own_choices", "own_rolling"], eval_pos=["fake_quant"])
    result = case(quant=quant, eval=[section | {"bs": 1}, section | {"bs": 5}], save={"save_vllm": False}).compress()
    alone, together = ([one.value for one in result.answers[start : start + 3]] for start in (0, 3))
    assert alone == together


def test_text_for_a_task_is_written_by_the_whole_model(case, asking, own, source, tmp_path):
    with_end = shutil.copytree(source, tmp_path / "ends")
    tokenizer = AutoTokenizer.from_pretrained(with_end)
    tokenizer.eos_token = "w"
    tokenizer.save_pretrained(with_end)
    run = case(with_end, eval=[asking(tasks=["own_choices", "own_writing"], limit=3)])
    found = {(one.position, one.name) for one in run.compress().answers}
    assert found == {(p, name) for p in ("pretrain", "fake_quant") for name in ("own_choices", "own_writing")}
    section = asking(tasks=["own_writing"])
    with pytest.raises(ConfigError, match=r"own_writing lets the model write text.*activations are rounded") as caught:
        prepare(load_config(case(with_end, quant=W8A8, eval=[section], save={"save_vllm": False}).content, ()))
    assert "eval.server" in str(caught.value)


def test_a_server_is_asked_after_the_run(case, asking, source):
    backend = Backend(reload(source), AutoTokenizer.from_pretrained(source))
    few = asking(tasks=["own_choices"], limit=5, eval_pos=["pretrain"])  # a server's prompts are a token shorter
    with serving(backend) as url:
        answers = case(eval=[few | {"server": url}, few]).compress().answers
    asked, own = answers[:2], answers[2:]
    assert [(one.metric, one.value) for one in asked] == [(one.metric, one.value) for one in own]
    assert "by tiny on a server" in asked[0].protocol and "by llmc in float32" in own[0].protocol
    gone = case(eval=[asking(tasks=["own_choices"], server=url, eval_pos=["fake_quant"])])
    with pytest.raises(RunError, match=r"the run is done and written .*nothing that is understood answers"):
        gone.compress()
    assert (gone.save_path / "metrics.json").is_file()


BAD = {
    "no-tasks": ({"tasks": []}, "eval.0.tasks: missing"),
    "name": ({"name": "arc"}, "'arc' has no use with lm_eval"),
    "no-format": ({"save": {"save_fake": False, "save_vllm": False}}, "needs save.save_path and a format"),
    "two-positions": ({"server": "http://127.0.0.1:1/v1"}, "a server runs one model"),
    "address": ({"server": "127.0.0.1:1", "eval_pos": ["pretrain"]}, "isn't an address"),
    "share": ({"limit": 1.5}, "1.5 is neither a number of documents nor a share"),
    "ppl": ({"type": "ppl", "name": "c4", "seq_len": 8}, "has no use with type ppl, only with lm_eval"),
    "vqa": ({"type": "vqa", "tasks": [], "limit": None, "name": "mme"}, "asked by lmms-eval"),
    "code": ({"type": "code", "tasks": [], "limit": None, "name": "human_eval"}, "tasks: [humaneval]"),
    "acc": ({"type": "acc", "tasks": [], "limit": None, "name": "imagenet1k"}, "compresses language models"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_is_refused_before_a_weight_is_read(case, asking, name):
    changes, said = BAD[name]
    save = changes.pop("save", {})
    with pytest.raises(ConfigError) as caught:
        prepare(load_config(case(eval=[asking(**changes)], save=save).content, ()))
    assert said in str(caught.value).replace("eval.0 (", "eval.0.").replace("\n", " ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": " ".join(["w3"] * 60)}, "prompt 2 (prompts.jsonl, line 2) has 60 tokens, and 5 new ones"),
        ({"text": "w1"}, "prompts.jsonl, line 2 holds a text, not a prompt"),
        ({"messages": [{"role": "user", "content": "w1"}]}, "set eval.apply_chat_template: True"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_named(case, prompts, tmp_path, line, said):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "w1"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError) as caught:
        prepare(load_config(case(eval=[prompts]).content, ()))
    assert said in str(caught.value)


def test_a_chat_is_written_by_the_template(case, prompts, source, tmp_path):
    chatting = shutil.copytree(source, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(chatting)
    tokenizer.chat_template = (
        "{% for m in messages %}w5 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w6{% endif %}"
    )
    tokenizer.save_pretrained(chatting)
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + '{"prompt": "w7"}\n')
    content = case(chatting, eval=[prompts | {"apply_chat_template": True}]).content
    assert prepare(load_config(content, ())).jobs.prompts[0].prompts == ("w5 w1 w6", "w5 w7 w6")
