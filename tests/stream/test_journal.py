"""What the journal says once, it says after every crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.stream.journal import Journal

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.fixed_dictionaries({"kind": st.sampled_from(["unit", "activations"]), "unit": VALUES}), max_size=5)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal.jsonl"


@given(rows=ROWS, data=st.data())
def test_truncated_at_any_byte_it_holds_a_prefix_and_goes_on(rows, data):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        journal = Journal(path)
        ends = [0]
        for row in rows:
            journal.append(row)
            ends.append(path.stat().st_size)
        cut = data.draw(st.integers(0, ends[-1]), label="cut")
        os.truncate(path, cut)
        whole = sum(end <= cut for end in ends) - 1
        torn = Journal(path)
        assert torn.rows == rows[:whole]
        torn.append({"kind": "unit", "unit": "next"})
        assert Journal(path).rows == [*rows[:whole], {"kind": "unit", "unit": "next"}]


@given(tail=st.binary(max_size=40))
def test_garbage_behind_the_last_row_is_cut_off(tail):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        Journal(path).append({"kind": "unit", "unit": "a"})
        good = path.read_bytes()
        path.write_bytes(good + b"\0" + tail)
        assert Journal(path).rows == [{"kind": "unit", "unit": "a"}]
        assert path.read_bytes() == good


def test_rows_behind_a_damaged_line_do_not_count(path):
    rows = [json.dumps({"kind": "unit", "unit": name}).encode() for name in "abc"]
    path.write_bytes(b"\n".join([rows[0], rows[1][:-1], rows[2], b""]))
    assert [row["unit"] for row in Journal(path).rows] == ["a"]


def test_a_row_is_on_the_disk_when_append_returns(path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino) or fsync(handle))
    journal = Journal(path)
    assert path.parent.stat().st_ino in synced
    synced.clear()
    journal.append({"kind": "unit", "unit": "a"})
    assert synced == [path.stat().st_ino]
    assert json.loads(path.read_text()) == {"kind": "unit", "unit": "a"}


def test_reopened_it_says_the_same(path):
    journal = Journal(path)
    journal.append({"kind": "unit", "unit": "a", "text": "two\nlines\r and \u2028 more"})
    journal.append({"kind": "activations", "after": 1})
    journal.append({"kind": "activations", "after": 3})
    again = Journal(path)
    assert again.rows == journal.rows
    assert again.unit("a") == journal.rows[0]
    assert again.unit("b") is None
    assert again.last("activations") == {"kind": "activations", "after": 3}
    assert again.last("other") is None
