from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import datasets
import pytest
import torch

from llmc.data import EvaluationSpec, evaluation_windows
from llmc.errors import DataError

BOS = 0


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


def ids(start: int, stop: int) -> list[int]:
    """What the conftest's tokenizer makes of ``words(start, stop)``."""
    return [2 + i for i in range(start, stop)]


@pytest.fixture
def hub(monkeypatch):
    """Replaces `datasets.load_dataset` (no hub is asked) by one that returns these documents, and notes the split."""
    documents: list[str] = []
    splits: list[str] = []

    def load_dataset(path, split, **options):
        splits.append(split)
        return datasets.Dataset.from_dict({"sentence" if "ptb" in path else "text": documents})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return documents, splits


def test_local_text_is_one_string_without_special_tokens(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text(words(0, 5) + "\n\n" + words(5, 11) + "\n")
    made = evaluation_windows(EvaluationSpec("mine", str(tmp_path / "t.txt"), False, 4), tokenizer)
    assert made.tokens.tolist() == [ids(0, 4), ids(4, 8)]
    assert made.tokens.dtype == torch.int64
    assert made.protocol == "t.txt, gptq protocol, 2 windows of 4, no special tokens"
    expected = b"".join(token.to_bytes(8, "little") for token in ids(0, 8))
    assert made.sha256 == hashlib.sha256(expected).hexdigest()


def test_num_chunks_takes_the_first(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text(words(0, 50))
    made = evaluation_windows(EvaluationSpec("mine", str(tmp_path / "t.txt"), False, 4, num_chunks=3), tokenizer)
    assert made.tokens.tolist() == [ids(0, 4), ids(4, 8), ids(8, 12)]
    more = evaluation_windows(EvaluationSpec("mine", str(tmp_path / "t.txt"), False, 4, num_chunks=99), tokenizer)
    assert len(more.tokens) == 12


def test_wikitext2_gets_one_bos_and_keeps_blank_records(tokenizer, hub):
    hub[0].extend([words(0, 3), "", words(3, 8)])
    made = evaluation_windows(EvaluationSpec("wikitext2", None, True, 4), tokenizer)
    assert made.tokens.tolist() == [[BOS, *ids(0, 3)], ids(3, 7)]
    assert made.protocol == "wikitext2 test, gptq protocol, 2 windows of 4, the tokenizer's special tokens"


@pytest.mark.parametrize(("protocol", "split", "joint"), [("gptq", "test", " "), ("gptq_old", "validation", "\n\n")])
def test_ptb_new_and_old(tokenizer, hub, protocol, split, joint):
    hub[0].extend([words(0, 3), words(3, 8)])
    seen = []

    def spy(text, **options):
        seen.append(text)
        return tokenizer(text, **options)

    evaluation_windows(EvaluationSpec("ptb", None, True, 4, protocol=protocol), spy)
    assert (hub[1], seen) == ([split], [joint.join(hub[0])])


def test_c4_takes_the_first_1100_documents_and_256_windows(tokenizer, hub):
    hub[0].extend([words(i, i + 2) for i in range(1101)])
    made = evaluation_windows(EvaluationSpec("c4", None, True, 2), tokenizer)
    assert made.tokens.shape == (256, 2)
    whole = evaluation_windows(EvaluationSpec("c4", None, True, 2201), tokenizer)
    assert whole.tokens.shape == (1, 2201)  # a BOS and two words for each of the 1100 documents
    assert whole.tokens[0, -1] == ids(1100, 1101)[0]


def test_c4_old_draws_random_windows_with_seed_0(tokenizer, hub):
    hub[0].extend([words(100 * i, 100 * i + 2 + i) for i in range(20)])
    made = evaluation_windows(EvaluationSpec("c4", None, True, 8, protocol="gptq_old"), tokenizer)
    generator, expected = random.Random(0), []
    while len(expected) < 256:
        i = generator.randint(0, 19)
        document = [BOS, *ids(100 * i, 100 * i + 2 + i)]
        if len(document) > 8:
            start = generator.randint(0, len(document) - 9)
            expected.append(document[start : start + 8])
    assert made.tokens.tolist() == expected
    with pytest.raises(DataError, match="no document of c4 validation is longer"):
        evaluation_windows(EvaluationSpec("c4", None, True, 50, protocol="gptq_old"), tokenizer)


def test_halves_of_one_file_share_no_line(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("\n".join(words(10 * i, 10 * i + 10) for i in range(30)))
    parts = [
        evaluation_windows(EvaluationSpec("mine", f"{tmp_path / 't.txt'}{part}", False, 5), tokenizer)
        for part in ("#0:0.5", "#0.5:1")
    ]
    seen = [set(part.tokens.flatten().tolist()) for part in parts]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(ids(0, 300))
    assert parts[1].protocol.startswith("t.txt#0.5:1, ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seq_len": 500}, r"50 tokens, less than one window of 500\n.*seq_len to 50"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"seq_len": 4, "num_chunks": 0}, "num_chunks 0"),
        ({"seq_len": 4, "protocol": "new"}, r"no protocol 'new'\n.*gptq, gptq_old"),
        ({"seq_len": 4, "name": "pileval"}, "not to evaluate on"),
    ],
)
def test_errors(tmp_path, tokenizer, options, says):
    (tmp_path / "t.txt").write_text(words(0, 50))
    spec = EvaluationSpec(**({"name": "mine", "path": str(tmp_path / "t.txt"), "download": False} | options))
    with pytest.raises(DataError, match=says):
        evaluation_windows(spec, tokenizer)


def test_blank_text(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"t.txt holds no text"):
        evaluation_windows(EvaluationSpec("mine", str(tmp_path / "t.txt"), False, 4), tokenizer)


def test_real_text_where_it_is_at_hand(tokenizer):
    """WikiText-2 from the folder LLMC_SHARED, if this machine has it; the number of words is known."""
    shared = Path(os.environ.get("LLMC_SHARED", Path(__file__).parents[3] / "shared"))
    file = shared / "data" / "wikitext2" / "test.txt"
    if file.is_file():
        made = evaluation_windows(EvaluationSpec("wikitext2", str(file), False, 1024, num_chunks=32), tokenizer)
        assert made.tokens.shape == (32, 1024)
        assert made.protocol.startswith("test.txt, gptq protocol, 32 windows of 1024")
