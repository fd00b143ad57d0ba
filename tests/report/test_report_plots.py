"""Charts as files: every line is what it's said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from llmc.report.page.data import BlockRow, LayerRow, Run, Spread
from llmc.report.page.plots import _charts


def spread(kurtosis: float) -> Spread:
    return Spread(kurtosis, None, None, None, None, (), None)


@pytest.fixture
def drawn() -> dict[str, Figure]:
    """By their names, those of a run of two blocks."""
    blocks = tuple(
        BlockRow(
            index,
            1.0,
            0.1 * (index + 1),
            {
                "q": LayerRow(sqnr_db=20.0 + index),
                "experts.0.up": LayerRow(sqnr_db=30.0),
                "experts.1.up": LayerRow(sqnr_db=40.0),
            },
            {"q": (spread(50.0 + index), spread(5.0 + index))},
        )
        for index in range(2)
    )
    found = {}
    for name, draw in _charts([Run("r", Path("r"), True, {}, {}, {}, blocks)]):
        found[name] = Figure()
        draw(found[name])
    return found


def test_there_is_a_chart_for_each_number_that_is_there(drawn):
    assert list(drawn) == ["error_by_block", "sqnr_by_layer", "kurtosis_of_inputs"]


def test_inputs_are_solid_before_and_dashed_behind_a_transform(drawn):
    axes = drawn["kurtosis_of_inputs"].axes[0]
    lines = {line.get_linestyle(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines == {"-": [50.0, 51.0], "--": [5.0, 6.0]}
    assert "dashed: transformed" in axes.get_ylabel()


def test_errors_and_layers_stand_at_their_blocks(drawn):
    (line,) = drawn["error_by_block"].axes[0].get_lines()
    assert line.get_xydata().tolist() == [[0, 0.1], [1, 0.2]]
    axes = drawn["sqnr_by_layer"].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "experts.0-1.up"]
    assert np.array_equal(axes.images[0].get_array(), [[20, 21], [35, 35]])
