"""What of a run's inputs, sizes, times and experts is shown: each number in its place, the worst first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmc.report.page import read_run
from llmc.report.page.compare import comparison_of
from llmc.report.page.data import BlockRow, Experts, Output, Spread
from llmc.report.page.heat import LEVELS
from llmc.report.page.inputs import kurtosis_charts, outliers
from llmc.report.page.sections import page_of

ATTENTION, DOWN = "self_attn.q_proj+self_attn.k_proj", "mlp.down_proj"


def spread(kurtosis, count=0, share=0.0, worst=()) -> Spread:
    return Spread(kurtosis, None, None, count, share, tuple(worst), None)


BLOCKS = [
    BlockRow(
        3,
        1.0,
        None,
        {},
        {
            ATTENTION: (spread(50.0, 2, 0.25, [(7, 12.0), (1, 8.0)]), spread(5.0, 1, 0.125, [(7, 7.0)])),
            DOWN: (spread(400.0, 1, 0.5, [(2, 90.0)]), None),
        },
    ),
    BlockRow(4, 1.0, None, {}, {ATTENTION: (spread(20.0, 1, 0.0625, [(9, 30.0)]), spread(3.0)), DOWN: (None, None)}),
]


def test_kurtosis_before_and_after_stand_in_charts_of_one_scale():
    attention, down = kurtosis_charts(BLOCKS)
    assert (attention.title, down.title) == ("self_attn: q_proj, k_proj", "mlp: down_proj")
    assert [hover.tip.splitlines() for hover in attention.hovers] == [
        ["block 3", "original: 50.00", "transformed: 5.000"],
        ["block 4", "original: 20.00", "transformed: 3.000"],
    ]
    assert [hover.tip.splitlines() for hover in down.hovers] == [["block 3", "original: 400.0"], ["block 4"]]
    assert attention.up == down.up


def test_the_inputs_with_the_largest_outliers_come_first():
    found = outliers(BLOCKS)
    assert (found.inputs, found.transformed) == (3, True)
    assert [(row.block, row.name) for row in found.rows] == [
        (3, "mlp: down_proj"),
        (4, "self_attn: q_proj, k_proj"),
        (3, "self_attn: q_proj, k_proj"),
    ]
    row = found.rows[2]
    assert (row.before, row.after, row.share_before, row.share_after) == ("2", "1", "25.0 %", "12.5 %")
    assert row.worst == "7 (\N{MULTIPLICATION SIGN}12.0), 1 (\N{MULTIPLICATION SIGN}8.00)"


def test_worst_channels_are_read_largest_first():
    worst = [{"channel": 3, "ratio": 7.0}, {"channel": 8, "ratio": 50.0}]
    read = BlockRow.of(
        {
            "unit": "block-5",
            "layers": {},
            "activations": {"q": {"original": {"outliers": {"worst": worst}}, "transformed": None}},
        }
    )
    original, transformed = read.inputs["q"]
    assert (read.number, original.worst, transformed) == (5, ((8, 50.0), (3, 7.0)), None)


def test_sizes_are_shares_of_the_largest_and_times_of_the_whole(made):
    run = read_run(made["rtn"].folder)
    original = run.model["bytes"]
    larger = Output("save_big", "big", 4 * original, 16.0, "")
    half = Output("save_half", "half", original // 2, 2.0, "")
    page = page_of(replace(run, outputs=(larger, half)))
    assert [(one.name, one.percent) for one in page.sizes] == [
        ("original", pytest.approx(25)),
        ("save_big", 100),
        ("save_half", pytest.approx(12.5, rel=1e-3)),
    ]
    facts = {**run.facts, "seconds": 40.0, "seconds_by_kind": {"read": 4.0, "calibrate": 20.0}}
    shares = page_of(replace(run, facts=facts)).seconds
    assert [(one.name, one.percent) for one in shares] == [("calibrate", 50), ("read", 10), ("other", 40)]


def test_experts_are_coloured_by_the_root_of_their_tokens(made):
    counted = Experts("block-0", 4, 0, 15.0, 100, (0,), 50, (0, 5, 26, 100))
    load = page_of(replace(read_run(made["rtn"].folder), experts=(counted,))).load
    assert [cell.level for cell in load.rows[0].cells] == [0, 2, LEVELS // 2, LEVELS - 1]


def test_the_rise_of_the_perplexity_has_its_sign(made):
    run = read_run(made["rtn"].folder)
    before, after = run.evaluations
    told = []
    for value in (12.0, 8.0):
        one = replace(run, evaluations=(replace(before, value=10.0), replace(after, value=value)))
        rows = {row.name: row for row in comparison_of([one, run]).numbers.rows}
        told.append(rows["Rise of the perplexity"].entries[0].text)
    assert told == ["+20.00 %", "-20.00 %"]
