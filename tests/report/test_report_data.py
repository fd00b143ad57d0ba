"""From metrics to what is shown: numbers, scales, colours, marks."""

from __future__ import annotations

import base64
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from invented import SUBSETS, add_surfaces
from safetensors.numpy import load_file
from safetensors.torch import save_file

from llmc.algorithms import options_types
from llmc.config import load_config
from llmc.errors import RunError
from llmc.report.page import read_run
from llmc.report.page.chart import HEIGHT, Line, Scale, line_chart
from llmc.report.page.compare import comparison_of, differences, marked, unique_names
from llmc.report.page.data import BlockRow, Experts, LayerRow, Run
from llmc.report.page.heat import LEVELS, MEASURES, heat
from llmc.report.page.recipe import yaml_of
from llmc.report.page.render import render_run
from llmc.report.page.sections import page_of
from llmc.report.page.surface import read_surfaces
from llmc.report.page.words import MISSING, change, grid, number, percent


@pytest.mark.parametrize("value", [random.Random(1).uniform(1, 10) * 10.0**power for power in range(-9, 12)])
def test_a_number_keeps_its_significant_digits(value):
    assert float(number(value, 5).replace(",", "")) == pytest.approx(
        value, rel=6e-4 if value < 1e-3 or value >= 1e6 else 6e-5
    )


def test_numbers_in_words():
    assert (number(None), number(0), number(1234.5678), number(0.012345)) == (MISSING, "0", "1,235", "0.01235")
    assert (percent(0.4367), change(10, 12.5), change(10, 8)) == ("43.7 %", "+25.0 %", "\N{MINUS SIGN}20.0 %")


def test_a_grid_in_words():
    spec = {"bits": 4, "symmetric": False, "granularity": {"kind": "PerGroup", "size": 64}, "grid": "int"}
    assert grid(spec) == "4-bit integers, asymmetric, groups of 64"
    floats = {"bits": 8, "symmetric": True, "granularity": {"kind": "PerToken"}, "grid": "e4m3", "static": None}
    assert grid(floats) == "FP8 (E4M3), one scale a token, dynamic"


@pytest.mark.parametrize("log", [True, False])
def test_a_chart_puts_values_where_they_belong(log):
    values = (0.001, 0.1, None, 0.02)
    chart = line_chart("x", [3, 4, 5, 6], [Line("a", 1, values)], axis="x", log=log)
    scale = Scale.over([0.001, 0.1, 0.02], log)
    place = math.log10 if log else float
    heights = {hover.at: [height for _, height in hover.dots] for hover in chart.hovers}
    assert heights[62.5] == []
    for at, value in ((12.5, 0.001), (37.5, 0.1), (87.5, 0.02)):
        share = (place(value) - scale.low) / (scale.high - scale.low)
        assert heights[at] == [pytest.approx(100 * share, abs=0.01)]
        assert f"{at * 10:.0f} {HEIGHT - HEIGHT * share:.0f}" in chart.curves[0].path
    assert chart.curves[0].path.count("M") == 2  # a gap
    assert all(scale.low <= place(tick) <= scale.high for tick in scale.ticks()) and len(scale.ticks()) >= 3


@pytest.mark.parametrize("span", [(3e-7, 4e2), (0.0083, 0.0119), (5.0, 5.0), (1, 9)])
def test_every_scale_has_marks(span):
    for log in (True, False):
        assert 2 <= len(Scale.over(span, log).ticks()) <= 8


def test_a_scale_from_zero_begins_there():
    scale = Scale.over([5.0, 10.0], log=False, from_zero=True)
    assert scale.at(0.0) == 0 and scale.at(5.0) == pytest.approx(scale.at(10.0) / 2, abs=0.01)


def blocks_of(errors):
    return [
        BlockRow(index, 1.0, None, {name: LayerRow(error=error) for name, error in row.items()}, {})
        for index, row in enumerate(errors)
    ]


def test_a_heat_map_is_logarithmic_and_takes_experts_together():
    rows = [{"q": 1e-4, "experts.0.up": 1e-2, "experts.1.up": 3e-2}, {"q": 1e-3}]
    made = heat(blocks_of(rows), MEASURES[0])
    cells = {row.name: row.cells for row in made.rows}
    assert list(cells) == ["q", "experts.0-1.up"]
    assert [cell.level for cell in cells["q"]] == [0, int(LEVELS * math.log10(10) / math.log10(200))]
    expert, absent = cells["experts.0-1.up"]
    assert (float(expert.text), expert.level) == (0.02, LEVELS - 1)
    assert "2 experts" in expert.more and "0.01000 to 0.03000" in expert.more
    assert (absent.text, absent.level) == ("", None)


@pytest.mark.parametrize(
    ("key", "better", "field", "values"),
    [
        ("error", None, "error", (1e-4, 1.1e-2, 1.0)),
        ("sqnr", "high", "sqnr_db", (40.0, 29.0, 20.0)),
        ("cosine", "high", "cosine", (1 - 1e-4, 1 - 1.1e-3, 1 - 1e-2)),
        ("kurtosis", None, "kurtosis", (2.0, 22.0, 200.0)),
        ("bits", None, "bits", (2.0, 5.1, 8.0)),
        ("sparsity", None, "sparsity", (0.0, 0.51, 1.0)),
        ("zeros", None, "zeros", (0.1, 0.31, 0.5)),
        ("clipped", "low", "clipped", (0.0, 0.051, 0.1)),
    ],
)
def test_every_measure_has_its_colours(key, better, field, values):
    """From the coolest over the middle of its scale to the hottest, which is the worst where there is one."""
    measure = next(one for one in MEASURES if one.key == key)
    blocks = [BlockRow(index, 1.0, None, {"q": LayerRow(**{field: one})}, {}) for index, one in enumerate(values)]
    made = heat(blocks, measure)
    assert [cell.level for cell in made.rows[0].cells] == [0, LEVELS // 2, LEVELS - 1]
    assert (measure.better, made.judged) == (better, better is not None)


def test_no_number_no_heat_map():
    assert heat(blocks_of([{"q": 1e-4}]), MEASURES[1]) is None


def test_the_best_is_marked_only_where_there_is_a_choice():
    def best(values, better):
        return [entry.best for entry in marked(values, better, str)]

    assert best([3.0, 1.0, 2.0], "low") == [False, True, False]
    assert best([3.0, 1.0, 3.0], "high") == [True, False, True]
    assert best([1.0, 1.0], "low") == [False, False]
    assert best([None, 1.0], "low") == [False, False]
    assert best([1.0, 2.0], None) == [False, False]


def test_differing_keys_only():
    left = {"a": {"b": 1, "c": [1, 2]}, "save": {"save_path": "x"}}
    right = {"a": {"b": 2, "c": [1, 2]}, "save": {"save_path": "y"}, "d": "new"}
    assert [(one.key, one.values) for one in differences([left, right])] == [
        ("a.b", ("1", "2")),
        ("d", (MISSING, "new")),
    ]


def test_other_protocols_are_not_compared(made):
    left, right = (read_run(made[name].folder) for name in ("rtn", "gptq"))
    other = replace(right, evaluations=tuple(replace(one, identity="other") for one in right.evaluations))
    for runs, comparable in (([left, right], True), ([left, other], False)):
        rows = {row.name: row for row in comparison_of(runs).numbers.rows}
        row = rows["Perplexity on text (fake_quant)"]
        assert any(entry.best for entry in row.entries) is comparable
        assert ("not comparable" in row.note) is not comparable


def test_names_of_runs_differ(made):
    runs = [read_run(made["rtn"].folder)] * 2
    assert len(set(unique_names(runs))) == 2
    assert unique_names([read_run(made[name].folder) for name in ("rtn", "gptq")]) == ["rtn", "gptq"]


def test_the_shown_configuration_is_the_run_s(made):
    for one in made.values():
        shown = yaml_of(one.metrics["config"])
        assert load_config(yaml.safe_load(shown), (), options_types()).resolved == one.metrics["config"]
        assert len(shown) < len(yaml.safe_dump(one.metrics["config"])) / 2


def test_surfaces_keep_every_cell(made):
    tensors = load_file(made["rtn"].folder / "surfaces.safetensors")
    found = read_surfaces(made["rtn"].folder / "surfaces.safetensors")
    assert [block.number for block in found.blocks] == [0, 3] and found.tokens == 2048
    assert [pair.layer for pair in found.blocks[0].pairs] == list(SUBSETS.values())
    for block in found.blocks:
        for pair in block.pairs:
            for state, kept in (("original", pair.original), ("transformed", pair.transformed)):
                wanted = tensors[f"model.layers.{block.number}.{pair.layer}|{state}"].astype(float)
                codes = np.frombuffer(base64.b64decode(kept.data), np.uint8).reshape(kept.rows, kept.columns)
                # Half a step of the square root: |x - peak (b/255)²| ≤ peak (b/255) / 255 and a little.
                assert np.all(np.abs(wanted - pair.peak * (codes / 255.0) ** 2) <= pair.peak * (codes + 1) / 255**2)
                assert kept.largest == wanted.max() and pair.channels == 64


def test_a_surface_that_a_transform_raises_fits_into_the_common_scale(tmp_path):
    tensors = {"original": torch.full((2, 3), 2.0), "transformed": torch.tensor([[8.0, 2.0, 0.0]] * 2)}
    file = tmp_path / "surfaces.safetensors"
    save_file({f"model.layers.0.mlp.down_proj|{state}": cells for state, cells in tensors.items()}, file)
    ((pair,),) = (block.pairs for block in read_surfaces(file).blocks)
    assert (pair.peak, pair.channels) == (8.0, 3)
    assert set(base64.b64decode(pair.original.data)) == {round(255 * (2 / 8) ** 0.5)}
    assert list(base64.b64decode(pair.transformed.data)) == [255, round(255 * (2 / 8) ** 0.5), 0] * 2


def test_of_many_surfaces_some_are_shown(tmp_path):
    add_surfaces(tmp_path, list(range(30)))
    found = read_surfaces(tmp_path / "surfaces.safetensors")
    assert found.stored == 30
    assert [block.number for block in found.blocks] == [0, 4, 8, 12, 17, 21, 25, 29]


def surfaces_of(file: Path, cells: torch.Tensor, **metadata: str) -> None:
    save_file({"model.layers.0.mlp.down_proj|original": cells}, file, metadata)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"nothing"),
        lambda file: surfaces_of(file, torch.ones(3, 4), tokens="many"),
        lambda file: surfaces_of(file, torch.ones(3, 4), channels="{"),
        lambda file: surfaces_of(file, torch.ones(3)),
        lambda file: surfaces_of(file, torch.ones(3, 4, 5)),
        lambda file: surfaces_of(file, torch.ones(3, 4).to(torch.float8_e4m3fn)),
        lambda file: surfaces_of(file, torch.ones(3, 4).bfloat16()),
        lambda file: file.mkdir(),
    ],
)
def test_a_damaged_file_of_surfaces_is_named(made, tmp_path, damage):
    broken = tmp_path / "surfaces.safetensors"
    damage(broken)
    with pytest.raises(RunError, match=r"surfaces\.safetensors can't be read"):
        read_surfaces(broken)
    page = page_of(replace(read_run(made["rtn"].folder), surfaces=broken))
    assert page.surfaces is None and str(broken) in render_run(page)


def test_a_page_of_a_very_large_mixture_stays_small():
    names = [f"self_attn.{one}_proj" for one in "qkvo"]
    names += [f"mlp.experts.{index}.{one}_proj" for index in range(160) for one in ("gate", "up", "down")]
    chance = random.Random(0)
    layer = LayerRow(cosine=0.99, sqnr_db=20.0, kurtosis=3.0, clipped=0.001, zeros=0.1, bits=4.25)
    blocks = tuple(
        BlockRow(index, 9.0, 0.01, {name: replace(layer, error=chance.random()) for name in names}, {})
        for index in range(126)
    )
    tokens = tuple(chance.randrange(3000) for _ in range(160))
    experts = tuple(Experts(f"block-{index}", 160, 0, 9.0, 3000, (1, 2), 512, tokens) for index in range(126))
    run = Run("large", Path("large"), False, {"quant": {"method": ["GPTQ"]}}, {}, {}, blocks, experts=experts)
    assert len(render_run(page_of(run)).encode()) < 3e6
