"""Published numbers as data: what stands in the file, and what is refused."""

from __future__ import annotations

import pytest

from llmc.errors import DataError
from scripts.reproduce import SUITES
from scripts.reproduction.published import COLUMNS, read_published

ROW = "m/rtn/w4a16/wikitext2@me\tm\trtn\tW4A16\twikitext2\tgptq 2048\t-\t5.5\tMe\tarXiv:1\t-"


def written(tmp_path, *rows):
    file = tmp_path / "published.tsv"
    file.write_text("\n".join(["\t".join(COLUMNS), *rows]) + "\n")
    return file


def test_the_rows_that_papers_are_known_for():
    """Typed from the papers, not from the file."""
    rows = read_published(SUITES / "published.tsv")
    assert len(rows) > 900
    values = {
        "llama-2-7b/gptq/w4a16g128/wikitext2@llmc": 5.623,
        "llama-2-7b/gptq/w2a16g64/wikitext2@llmc": 14.968,
        "llama-2-7b/awq/w3a16g128/wikitext2@llmc": 6.243,
        "llama-2-7b/omniquant/w4a4/wikitext2@llmc": 12.212,
        "llama-2-7b/smoothquant/w8a8/wikitext2@llmc": 5.589,
        "llama-2-7b/wanda/sparse50%/wikitext2@llmc": 6.91,
        "llama-2-7b/float/16/wikitext2-4096@wanda": 5.12,
        "opt-125m/gptq/w4a16/wikitext2@gptq": 31.12,
        "opt-1.3b/rptq/w4a4/wikitext2@rptq": 16.88,
        "llama-3.1-405b/quarot-rtn/w8a8/wikitext2@llmc": 1.46,
    }
    assert {key: rows[key].value for key in values} == values


def test_ids_say_what_the_columns_say():
    for one in read_published(SUITES / "published.tsv").values():
        model, method, scheme, text = one.id.rpartition("@")[0].split("/")
        assert (model, method, scheme) == (one.model, one.method, one.scheme.lower())
        kind, _, length = one.protocol.partition(" ")
        ending = {"p1": f"p1-{length}", "gptq": one.text + f"-{length}" * (length != "2048")}
        ending["gptq_old"] = one.text if one.text == "wikitext2" else f"{one.text}-old"
        assert text == ending[kind]


def test_what_a_source_leaves_open_is_said():
    for one in read_published(SUITES / "published.tsv").values():
        assert ("calibration" in one.unstated) == (one.calibration == "?")
        assert one.is_complete == (one.unstated == "-")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW.replace("\t5.5\t", "\tOOM\t"), r"line 2: value OOM is no perplexity"),
        (ROW.replace("\t5.5\t", "\t0.5\t"), r"line 2: value 0.5 is no perplexity"),
        (ROW.replace("\t5.5\t", "\tnan\t"), r"line 2: value nan is no perplexity"),
        (ROW.replace("\tMe\t", "\t\t"), r"line 2: \['publisher'\]"),
        (ROW.rpartition("\t")[0], r"line 2: \['unstated'\]"),
        (ROW + "\tmore", r"line 2: more cells than columns"),
        (f"{ROW}\n{ROW}", r"line 3: .* stands there twice"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_published(written(tmp_path, row))


def test_other_columns_are_refused(tmp_path):
    file = tmp_path / "published.tsv"
    file.write_text("id\tvalue\n")
    with pytest.raises(DataError, match="columns"):
        read_published(file)
