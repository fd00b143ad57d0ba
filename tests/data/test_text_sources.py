from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.data.files import PathFraction
from llmc.data.texts import PUBLIC_SETS, Source, load_corpus, split_for
from llmc.errors import DataError


def load(path: Path | str | None, field: str | None = None, name: str = "custom", split: str = "train"):
    return load_corpus(Source(name, path and str(path), False, split, field))


def test_a_text_file_is_one_text_and_many_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\ntwo\n".encode())
    corpus = load(tmp_path / "a.txt")
    assert corpus.joined("|") == "one\r\n\ntwo\n"
    assert corpus.documents == ["one", "", "two", ""]
    assert corpus.is_local


def test_a_folder_joins_its_files_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("b1\nb2")
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n\n{"text": "a2"}\n')
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    corpus = load(tmp_path)
    assert corpus.joined("|") == "a1|a2|b1\nb2"
    assert corpus.documents == ["a1", "a2", "b1", "b2"]


def test_parquet_finds_the_only_or_the_named_field(tmp_path):
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"title": ["t", "u"], "body": ["x", None]}).to_parquet(str(file))
    assert list(load(file, "body").documents) == ["x", ""]
    with pytest.raises(DataError, match=r"its fields are 'body', 'title'\n.*text_field"):
        load(file)
    with pytest.raises(DataError, match=r"no field 'txt'; its fields are 'body', 'title'"):
        load(file, "txt")


def test_saved_data_sets_and_their_splits(tmp_path):
    one = datasets.Dataset.from_dict({"sentence": ["a", "b"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert list(load(tmp_path / "one").documents) == ["a", "b"]
    corpus = load(tmp_path / "two", name="ptb", split="test")
    assert list(corpus.documents) == ["b"]
    assert (corpus.origin, corpus.is_local) == ("ptb test", False)
    assert list(load(f"{tmp_path / 'one'}#0.5:1").documents) == ["b"]
    with pytest.raises(DataError, match=r"no split 'validation', only train, test"):
        load(tmp_path / "two", split="validation")


def test_a_damaged_saved_data_set(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="can't read the saved data set"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "purpose", "expected"),
    [
        ("wikitext2", "calibration", ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"})),
        ("wikitext2", "evaluation", ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"})),
        ("pileval", "calibration", ("mit-han-lab/pile-val-backup", {"split": "validation"})),
        (
            "c4",
            "calibration",
            ("allenai/c4", {"split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}),
        ),
        (
            "c4",
            "evaluation",
            (
                "allenai/c4",
                {"split": "validation", "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
            ),
        ),
        (
            "ptb",
            "evaluation",
            (
                "ptb-text-only/ptb_text_only",
                {
                    "split": "test",
                    "revision": "refs/convert/parquet",
                    "data_files": {"test": "penn_treebank/test/*.parquet"},
                },
            ),
        ),
    ],
)
def test_what_the_hub_is_asked_for(monkeypatch, name, purpose, expected):
    """No hub is asked: `datasets.load_dataset` is replaced, and only the call that it gets is checked."""
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return datasets.Dataset.from_dict({PUBLIC_SETS[name].text_field: ["some text"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus(Source(name, None, True, split_for(name, purpose)))
    assert calls == [expected]
    assert list(corpus.documents) == ["some text"] and not corpus.is_local


def test_hub_failures_say_what_was_tried(monkeypatch):
    """`datasets.load_dataset` is replaced by one that fails as it does without a connection."""

    def load_dataset(path, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"Salesforce/wikitext, split test.*no route\n.*download: false"):
        load_corpus(Source("wikitext2", None, True, "test"))
    with pytest.raises(DataError, match="no public text set 'wikitext3'"):
        load_corpus(Source("wikitext3", None, True, "test"))
    with pytest.raises(DataError, match="to calibrate with"):
        split_for("pileval", "evaluation")


def test_chats_need_the_template(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [], "id": 1}) + "\n")
    with pytest.raises(DataError, match=r"fields are 'id', 'messages'\n.*apply_chat_template"):
        load(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [{"from": "me"}]}) + "\n")
    with pytest.raises(DataError, match=r"b.jsonl, line 1: .*'role' and 'content'"):
        load_corpus(Source("custom", str(tmp_path / "b.jsonl"), False, "train", render=str))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("a.txt", b"fine\nbad \xff\n", r"byte 0xff at offset 9, in line 2"),
        ("a.txt", b"\xef\xbb\xbffine\nbad \xff\n", r"byte 0xff at offset 12, in line 2"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": }\n', r"a.jsonl, line 3 isn't valid JSON.*column 10"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"line 2 is list, not an object"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"line 2 has no field 'text'; its fields are 'txt'"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: the field 'text' holds int, not text"),
        ("samples.json", b'{"question": "x"}', r"isn't a JSON list of objects"),
        ("samples.json", b'[\n{"question": "x",}]', r"line 2, column"),
        ("a.parquet", b"PAR1", r"as parquet"),
        ("a.csv", b"x", r"none of .txt"),
    ],
)
def test_malformed_files_are_named_with_the_place(tmp_path, file, content, says):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=says) as raised:
        load(tmp_path / file)
    assert raised.value.remedy


def test_missing_paths(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no path is given"):
        load(None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no samples.json"):
        load(tmp_path / "empty")


def test_jsonl_fractions_keep_the_line_numbers(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\nbroken\n')
    assert load(f"{file}#0:0.5").documents == ["a", "b"]
    with pytest.raises(DataError, match="line 4"):
        load(f"{file}#0.6:1")


@pytest.mark.parametrize("suffix", ["#0.7:0.2", "#0:1.5", "#.:1", "#0.5:0.5"])
def test_fractions_that_make_no_sense(tmp_path, suffix):
    with pytest.raises(DataError, match="range of fractions"):
        PathFraction.parse(f"{tmp_path}/a.txt{suffix}")


def test_a_file_that_looks_like_a_fraction_wins(tmp_path):
    (tmp_path / "a.txt#0:1").write_text("x")
    assert PathFraction.parse(str(tmp_path / "a.txt#0:1")).path.name == "a.txt#0:1"
    assert PathFraction.parse("a.txt#:0.5") == PathFraction(Path("a.txt"), 0.0, 0.5)


@given(
    text=st.text(st.sampled_from("ab\n"), max_size=60),
    cuts=st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
)
def test_neighbouring_fractions_tile_the_text_at_line_ends(text, cuts):
    bounds = [0.0, *(cut / 100 for cut in sorted(cuts)), 1.0]
    parts = [PathFraction(Path("x"), a, b).cut_text(text) for a, b in pairwise(bounds)]
    assert "".join(parts) == text
    ends = [len("".join(parts[: i + 1])) for i in range(len(parts))]
    assert all(end in (0, len(text)) or text[end - 1] == "\n" for end in ends)
    rows = [i for a, b in pairwise(bounds) for i in PathFraction(Path("x"), a, b).row_range(37)]
    assert rows == list(range(37))
