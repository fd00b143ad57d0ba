"""What a comparison comes to, and how the page shows it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llmc.errors import ConfigError
from scripts.reproduction.golden import Golden, read_golden, write_golden
from scripts.reproduction.page import line, missing_lines, page, summary
from scripts.reproduction.published import Published
from scripts.reproduction.running import Outcome
from scripts.reproduction.suites import Cell, Suite
from scripts.reproduction.verdicts import WRONG, Verdict, judge, judge_cell, measured_golden

ROW = Published(
    "m/gptq/w4a16/wikitext2@me", "m", "gptq", "W4A16", "wikitext2", "gptq 2048", "?", 10.0, "Me", "x", "seed"
)
LOSSES = [1.0, 2.0, 4.0]


def cell(**comparison):
    comparison = {"tolerance": 0.05} | comparison
    return Cell(id="one", config=Path("one.yml"), model="m", compare=(comparison,), note="half of the samples")


def evaluated(position="fake_quant", value=10.0, name="wikitext2", kind="ppl"):
    return {
        "kind": kind,
        "name": name,
        "position": position,
        "value": value,
        "window_losses": LOSSES,
        "tokens_sha256": "abc",
    }


def judged(outcome, golden=None):
    return judge_cell(outcome, {ROW.id: ROW}, golden or {})[0]


@pytest.mark.parametrize(
    ("measured", "both_sides", "verdict"),
    [
        (10.0, False, Verdict.WITHIN),
        (10.49, False, Verdict.WITHIN),
        (10.51, False, Verdict.OUT),
        (9.51, False, Verdict.WITHIN),
        (9.49, False, Verdict.BETTER),
        (9.49, True, Verdict.OUT),
        (9.51, True, Verdict.WITHIN),
        (math.nan, False, Verdict.OUT),
        (math.inf, False, Verdict.OUT),
    ],
)
def test_a_number_is_within_better_or_out(measured, both_sides, verdict):
    assert judge(measured, 10.0, 0.05, both_sides=both_sides) is verdict


def test_only_golden_numbers_and_the_original_must_not_be_better():
    better = {"evaluation": [evaluated(value=9.0), evaluated("pretrain", 9.0)]}
    published = judged(Outcome(cell(published=ROW.id), better))
    assert published.verdict is Verdict.BETTER and published.difference == pytest.approx(-0.1)
    assert judged(Outcome(cell(published=ROW.id, position="pretrain"), better)).verdict is Verdict.OUT
    golden = {"one/fake_quant/wikitext2": Golden(10.0, "abc")}
    assert judged(Outcome(cell(golden=True), better), golden).verdict is Verdict.OUT
    assert judged(Outcome(cell(golden=True, both_sides=False), better), golden).verdict is Verdict.BETTER


def test_what_was_not_run_is_no_failure_and_what_crashed_is():
    missing = judged(Outcome(cell(published=ROW.id), missing=("model m",)))
    crashed = judged(Outcome(cell(published=ROW.id), error="exit status 1"))
    assert (missing.verdict, crashed.verdict) == (Verdict.MISSING, Verdict.FAILED)
    assert (missing.verdict in WRONG, crashed.verdict in WRONG) == (False, True)
    assert missing.measured is None and missing.difference is None


def test_a_golden_number_is_of_just_these_tokens():
    run = Outcome(cell(golden=True), {"evaluation": [evaluated()]})
    assert judged(run).verdict is Verdict.UNSET
    assert judged(run, {"one/fake_quant/wikitext2": Golden(10.0, "other")}).verdict is Verdict.UNSET
    assert judged(run, {"one/fake_quant/wikitext2": Golden(10.0, "abc")}).verdict is Verdict.WITHIN
    assert measured_golden(run) == {"one/fake_quant/wikitext2": Golden(10.0, "abc")}
    assert measured_golden(Outcome(cell(published=ROW.id), run.metrics)) == {}


def test_golden_numbers_that_were_not_measured_are_kept(tmp_path):
    write_golden(tmp_path, {"a/b/c": Golden(1.5, "x"), "d/e/f": Golden(2.5, "y")})
    write_golden(tmp_path, {"d/e/f": Golden(3.5, "z")})
    assert read_golden(tmp_path) == {"a/b/c": Golden(1.5, "x"), "d/e/f": Golden(3.5, "z")}


def test_the_first_windows_alone_can_be_compared():
    run = {"evaluation": [evaluated()]}
    assert judged(Outcome(cell(published=ROW.id, windows=2), run)).measured == pytest.approx(math.exp(1.5))
    with pytest.raises(ConfigError, match="4 windows are compared, but 3"):
        judged(Outcome(cell(published=ROW.id, windows=4), run))


def test_one_evaluation_answers_a_comparison():
    several = {"evaluation": [evaluated(), evaluated(name="c4", value=12.0), evaluated(kind="decode_ppl", value=99.0)]}
    assert judged(Outcome(cell(published=ROW.id, text="c4"), several)).measured == 12.0
    with pytest.raises(ConfigError, match="2 perplexities of fake_quant"):
        judged(Outcome(cell(published=ROW.id), several))
    with pytest.raises(ConfigError, match="0 perplexities of transformed"):
        judged(Outcome(cell(published=ROW.id, position="transformed"), several))


def test_the_page_has_every_number_and_what_to_know_of_it():
    suite = Suite(name="mine", folder=Path(), title="My suite", about="About it.", cells=())
    done = Outcome(cell(published=ROW.id), {"evaluation": [evaluated(value=10.2)]})
    lacking = Outcome(cell(published=ROW.id), missing=("model m: nowhere",))
    broken = Outcome(cell(golden=True), error="exit status 1; log ends with\nboom | bang")
    outcomes = [done, lacking, lacking, broken]
    verdicts = [one for outcome in outcomes for one in judge_cell(outcome, {ROW.id: ROW}, {})]
    text = page(suite, outcomes, verdicts, {ROW.id: ROW})
    assert text.startswith("# My suite\n\nAbout it.\n\n**4 numbers: 1 within, 1 FAILED, 2 not run.** llmc ")
    rows = [[part.strip() for part in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")]
    assert rows[2] == ["one", "m", "fake_quant", "10", "10.2", "+2.00%", "+5%", "within", "Me"]
    assert rows[3] == ["one", "m", "fake_quant", "10", "", "", "+5%", "not run", "Me"]
    assert rows[5] == ["one", "m", "fake_quant", "", "", "", "±5%", "FAILED", "golden"]
    assert {len(row) for row in rows} == {9}
    assert "- model m: nowhere [2 cells]" in text
    assert f"- `{ROW.id}`: seed" in text
    assert "- `one`: half of the samples" in text
    assert "```text\nexit status 1; log ends with\nboom | bang\n```" in text


def test_the_terminal_has_the_same_in_lines():
    verdict = judged(Outcome(cell(published=ROW.id), {"evaluation": [evaluated(value=10.2)]}))
    assert line(verdict) == "one  m  fake_quant  10  10.2  +2.00%  +5%  within  Me"
    assert summary([verdict]) == "1 numbers: 1 within"
    assert missing_lines([Outcome(cell(golden=True), missing=("a", "b"))]) == ["a [1 cell]", "b [1 cell]"]
