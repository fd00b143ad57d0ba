"""Reports as files: of finished, unfinished and foreign folders, by the run itself and by the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cases import make_case

import llmc
from llmc.cli import main
from llmc.report.page import compare_runs, write_report
from llmc.report.page import write as writing

HOSTILE = '<img src=x onerror="alert(1)"></title>&{{ 7 * 7 }}'


class Stop(Exception):
    pass


class StopsAfter:
    """A listener that ends the run behind a block, as a crash would."""

    def __init__(self, last: int) -> None:
        self.last = last

    def started(self, blocks, done):
        pass

    def phase(self, text):
        pass

    def block(self, index, row):
        if index == self.last:
            raise Stop


@pytest.fixture
def copied(made, tmp_path):
    """A finished run to be changed."""

    def copy(name: str, target: str = "copy") -> Path:
        return shutil.copytree(made[name].folder, tmp_path / target)

    return copy


@pytest.fixture
def unfinished(made, tmp_path) -> Path:
    """A run that ended behind its second block."""
    config = json.loads(json.dumps(made["plain"].metrics["config"]))
    config["save"]["save_path"] = str(tmp_path / "unfinished")
    with pytest.raises(Stop):
        llmc.compress(config, listener=StopsAfter(1))
    return tmp_path / "unfinished"


def change(folder: Path, **values) -> None:
    file = folder / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_run_writes_its_report(made):
    report = made["plain"].folder / "report.html"
    assert "4-bit integers, asymmetric, groups of 32" in report.read_text()


def test_a_run_writes_none_if_it_is_not_wanted(made, tmp_path):
    config = made["plain"].metrics["config"] | {"report": {"html": False, "analysis": False}}
    config["save"] = config["save"] | {"save_path": str(tmp_path / "out")}
    result = llmc.compress(config)
    assert result.report is None and not (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "metrics.json").exists()


def test_a_report_that_fails_does_not_fail_the_run(made, tmp_path, monkeypatch, capsys):
    def broken(page):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(writing, "render_run", broken)
    config = json.loads(json.dumps(made["plain"].metrics["config"]))
    case = make_case(Path(config["model"]["path"]), {"calib": "", "eval": config["eval"][0]["path"]}, tmp_path / "out")
    case.content["calib"]["path"] = config["calib"]["path"]
    assert main(case.arguments) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "report.html wasn't written: a bug" in told and "Done" in told
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["evaluation"]


def test_the_same_metrics_give_the_same_bytes(copied):
    folder = copied("rtn")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_what_comes_from_a_run_is_escaped(copied):
    folder = copied("rtn")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["config"]["model"]["path"] = metrics["model"]["path"] = HOSTILE
    metrics["config"]["save"]["save_path"] = f"runs/{HOSTILE}"
    metrics["versions"]["torch"] = metrics["evaluation"][0]["protocol"] = metrics["evaluation"][0]["name"] = HOSTILE
    metrics["outputs"] = {HOSTILE: {**metrics["outputs"]["save_vllm"], "serve": HOSTILE, "folder": HOSTILE}}
    row = metrics["blocks"][0]
    row["layers"][HOSTILE] = {**next(iter(row["layers"].values())), "fallback": HOSTILE}
    row["activations"][HOSTILE] = row["activations"]["mlp.down_proj"]
    change(folder, **metrics)
    other = copied("gptq", "other")
    for page in (write_report(folder), compare_runs([folder, other], folder / "both.html")):
        text = page.read_text()
        assert "<img" not in text and "&lt;img" in text and "{{ 7 * 7 }}" in text
        assert text.count("</title>") == 1 and text.count("<script>") == 1


def test_an_unfinished_run_has_a_report_from_its_journal(unfinished):
    journal = unfinished / ".llmc" / "journal.jsonl"
    with journal.open("a") as file:
        file.write('{"kind": "unit", "unit": "block-2", "torn')  # it may be going on
    before = journal.read_bytes()
    text = write_report(unfinished).read_text()
    assert "2 blocks done" in text and "come at the end of the run" in text and "2.13" in text
    assert '<th scope="row">self_attn.q_proj</th>' in text
    assert journal.read_bytes() == before


def test_an_unfinished_run_goes_on_with_a_report_beside_it(unfinished, made):
    write_report(unfinished)
    config = json.loads(json.dumps(made["plain"].metrics["config"]))
    config["save"]["save_path"] = str(unfinished)
    result = llmc.compress(config)
    assert "Compression report" in result.report.read_text()
    assert [one.value for one in result.perplexities] == [one["value"] for one in made["plain"].metrics["evaluation"]]


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: change(folder, schema=1), ["schema version 1", "reads version 2"]),
        (lambda folder: (folder / "metrics.json").write_text("{"), ["can't be read"]),
        (lambda folder: (folder / "metrics.json").write_text("[]"), ["isn't what llmc writes"]),
        (lambda folder: change(folder, blocks=[{"unit": "block-0"}]), ["isn't what this version", "layers"]),
        (lambda folder: (folder / "metrics.json").unlink(), ["isn't a run of llmc", "save_path"]),
        (shutil.rmtree, ["doesn't exist"]),
    ],
)
def test_what_is_no_run_is_one_clear_error(copied, capsys, prepare, said):
    folder = copied("rtn")
    prepare(folder)
    assert main(["report", str(folder), "--output", str(folder.parent / "x.html")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("\nerror: ") and str(folder) in told and all(part in told for part in said)
    assert not (folder.parent / "x.html").exists()


def test_the_command_writes_a_page_and_plots(made, tmp_path, capsys):
    folders = [str(made[name].folder) for name in ("rtn", "gptq")]
    page, plots = tmp_path / "deep" / "both.html", tmp_path / "plots"
    assert main(["report", *folders, "--output", str(page), "--plots", str(plots)]) == 0
    assert page.read_text().startswith("<!doctype html>") and str(page) in capsys.readouterr().out
    names = sorted(file.name for file in plots.iterdir())
    assert "error_by_block.png" in names and "kurtosis_of_inputs_gptq.svg" in names
    assert all((plots / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith(".png"))
    drawn = (plots / "error_by_block.svg").read_bytes()
    assert b"<svg" in drawn and b"<dc:date>" not in drawn


def without_fake(folder: Path) -> None:
    """A run that didn't write what it computed with."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["outputs"]["save_fake"]
    change(folder, outputs=metrics["outputs"])
    shutil.rmtree(folder / "fake_quant_model")


def test_exporting_again_renews_the_report(copied):
    folder = copied("plain")
    without_fake(folder)
    write_report(folder)
    assert "save_fake</code>" not in (folder / "report.html").read_text()
    assert main(["export", "--from", str(folder), "--to", "fake"]) == 0
    assert "save_fake</code>" in (folder / "report.html").read_text()


def config_of(folder: Path, **sections) -> str:
    """A file with the configuration of a run, some sections in the place of its own."""
    config = json.loads((folder / "metrics.json").read_text())["config"] | sections
    file = folder.parent / "again.yml"
    file.write_text(json.dumps(config))  # which is YAML
    return str(file)


def test_evaluating_again_renews_the_report(copied):
    folder = copied("plain")
    metrics = json.loads((folder / "metrics.json").read_text())
    change(folder, evaluation=[])
    write_report(folder)
    assert "Perplexity" not in (folder / "report.html").read_text()
    file = config_of(folder)
    assert main(["eval", "--config", file, "--from", str(folder), "--no-write"]) == 0
    assert "Perplexity" not in (folder / "report.html").read_text()
    assert main(["eval", "--config", file, "--from", str(folder)]) == 0
    assert "Perplexity" in (folder / "report.html").read_text()
    assert json.loads((folder / "metrics.json").read_text())["evaluation"] == metrics["evaluation"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda report: change(report.parent, experts=None), "isn't what this version of llmc writes"),
        (lambda report: (report.unlink(), report.mkdir()), "Is a directory"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_report_that_can_not_be_renewed_is_a_warning(copied, capsys, command, spoil, said):
    folder = copied("plain")
    without_fake(folder)
    change(folder, evaluation=[])
    spoil(folder / "report.html")
    asked = {"eval": ["--config", config_of(folder)], "export": ["--to", "fake"]}[command]
    assert main([command, "--from", str(folder), *asked]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "report.html wasn't written" in told and said in told
    metrics = json.loads((folder / "metrics.json").read_text())
    done = bool(metrics["evaluation"]), "save_fake" in metrics["outputs"]
    assert done == (command == "eval", command == "export")


def test_a_run_without_a_report_gets_none(copied):
    folder = copied("plain")
    without_fake(folder)
    (folder / "report.html").unlink()
    assert main(["export", "--from", str(folder), "--to", "fake"]) == 0
    assert not (folder / "report.html").exists()
