from __future__ import annotations

import json
import random
from pathlib import Path

import datasets
import pytest
import torch

from llmc.data import PRESETS, CalibrationSpec, calibration_samples
from llmc.errors import DataError

BOS, UNKNOWN = 0, 1


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


def ids(start: int, stop: int) -> list[int]:
    """What the conftest's tokenizer makes of ``words(start, stop)``."""
    return [2 + i for i in range(start, stop)]


def spec(path: Path | str | None, preproc: str, n: int, seq_len: int | None, **more) -> CalibrationSpec:
    options = {"name": "custom", "download": False, "seed": 42} | more
    return CalibrationSpec(path=path and str(path), n_samples=n, seq_len=seq_len, preproc=preproc, **options)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """40 lines of 10..49 different words, with blank lines between them."""
    file = tmp_path / "lines.txt"
    file.write_text("\n\n".join(words(50 * i, 50 * i + 10 + i) for i in range(40)) + "\n")
    return file


def as_lists(samples: list[torch.Tensor]) -> list[list[int]]:
    return [sample.tolist() for sample in samples]


def test_sequential_is_cut_by_hand(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(words(0, 7) + "\n" + words(7, 12))
    samples = calibration_samples(spec(tmp_path / "a.txt", "sequential", 2, 5), tokenizer)
    assert as_lists(samples) == [ids(0, 5), ids(5, 10)]
    assert all(sample.dtype == torch.int64 for sample in samples)


@pytest.mark.parametrize("seed", [0, 7])
def test_wikitext2_gptq_draws_the_windows_of_the_public_code(lines, tokenizer, seed):
    tokens = [BOS] + [
        t for line in lines.read_text().split("\n") for t in tokenizer.convert_tokens_to_ids(line.split())
    ]
    generator = random.Random(seed)
    expected = []
    for _ in range(4):
        start = generator.randint(0, len(tokens) - 16 - 1)
        expected.append(tokens[start : start + 16])
    samples = calibration_samples(spec(lines, "wikitext2_gptq", 4, 16, seed=seed), tokenizer)
    assert as_lists(samples) == expected


def test_c4_gptq_takes_windows_of_documents_longer_than_a_sample(lines, tokenizer):
    samples = as_lists(calibration_samples(spec(lines, "c4_gptq", 30, 40), tokenizer))
    documents = [[BOS, *ids(50 * i, 50 * i + 10 + i)] for i in range(40)]
    long = [d for d in documents if len(d) > 40]
    for sample in samples:
        assert len(sample) == 40
        assert any(d[s : s + 40] == sample for d in long for s in range(len(d) - 40))


def test_shuffling_presets_agree_with_datasets_shuffle(tmp_path, tokenizer):
    texts = [f"w{i} {words(100 + i, 110 + i)}" for i in range(60)]
    saved = datasets.Dataset.from_dict({"text": texts})
    saved.save_to_disk(tmp_path / "saved")
    order = saved.shuffle(seed=42)["text"]
    expected = [[BOS, *tokenizer.convert_tokens_to_ids(text.split())][:6] for text in order[:9]]
    samples = calibration_samples(spec(tmp_path / "saved", "pileval_smooth", 9, 6), tokenizer)
    assert as_lists(samples) == expected


def test_pileval_awq_leaves_out_long_documents_and_concatenates(tmp_path, tokenizer):
    (tmp_path / "d.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in (words(0, 600), f"  {words(700, 705)} ", words(800, 807)))
    )
    samples = as_lists(calibration_samples(spec(tmp_path / "d.jsonl", "pileval_awq", 2, 7), tokenizer))
    joined = samples[0] + samples[1]
    short, long = [BOS, *ids(700, 705)], [BOS, *ids(800, 807)]
    assert joined in ((short + long), (long + short))


def test_txt_general_takes_the_start_of_documents_that_are_long_enough(lines, tokenizer):
    samples = as_lists(calibration_samples(spec(lines, "txt_general_preproc", 5, 45), tokenizer))
    starts = {tuple([BOS, *ids(50 * i, 50 * i + 44)]) for i in range(34, 40)}
    assert len({tuple(s) for s in samples}) == 5
    assert {tuple(s) for s in samples} <= starts


def test_original_txt_keeps_documents_whole_and_skips_blank_lines(lines, tokenizer):
    samples = as_lists(calibration_samples(spec(lines, "original_txt", 40, None), tokenizer))
    assert sorted(samples) == sorted([BOS, *ids(50 * i, 50 * i + 10 + i)] for i in range(40))


def test_ultrachat_applies_the_template_once(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (sample,) = calibration_samples(spec(tmp_path / "chat.jsonl", "ultrachat_general", 1, 16), tokenizer)
    assert sample.tolist() == [BOS, UNKNOWN, *ids(1, 3), UNKNOWN, *ids(3, 4)]


def test_question_and_answer_with_and_without_the_template(tmp_path, tokenizer):
    folder = tmp_path / "custom_txt"
    folder.mkdir()
    (folder / "samples.json").write_text(json.dumps([{"question": "w1 w2", "answer": "w3", "image": "x.png"}]))
    (plain,) = calibration_samples(spec(folder, "original_txt", 1, None), tokenizer)
    (chat,) = calibration_samples(spec(folder, "original_txt", 1, None, apply_chat_template=True), tokenizer)
    assert plain.tolist() == [BOS, *ids(1, 4)]
    assert chat.tolist() == [BOS, UNKNOWN, *ids(1, 3), UNKNOWN, *ids(3, 4)]


RANDOM = ["wikitext2_gptq", "ptb_gptq", "c4_gptq", "pileval_awq", "pileval_smooth", "pileval_omni"]
RANDOM += ["txt_general_preproc", "random_truncate_txt", "original_txt", "ultrachat_general"]


@pytest.mark.parametrize("preproc", RANDOM)
def test_the_seed_alone_decides(lines, tokenizer, preproc):
    length = None if PRESETS[preproc].whole_documents else 8

    def draw(seed: int) -> list[list[int]]:
        return as_lists(calibration_samples(spec(lines, preproc, 6, length, seed=seed), tokenizer))

    random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), torch.get_rng_state())
    first = draw(3)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    random.seed(2)
    assert draw(3) == first
    assert draw(4) != first
    assert len(first) == 6


def test_every_preset_is_tested_for_its_seed():
    assert {*RANDOM, "sequential"} == set(PRESETS)


def test_halves_of_one_file_are_disjoint_and_whole(lines, tokenizer):
    whole = {tuple(s.tolist()) for s in calibration_samples(spec(lines, "original_txt", 40, None), tokenizer)}
    halves = []
    for part in ("#0:0.37", "#0.37:1"):
        try:
            calibration_samples(spec(f"{lines}{part}", "original_txt", 99, None), tokenizer)
        except DataError as error:
            count = int(error.message.split(" documents")[0].split()[-1])
        samples = calibration_samples(spec(f"{lines}{part}", "original_txt", count, None), tokenizer)
        halves.append({tuple(s.tolist()) for s in samples})
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == whole


def test_overlapping_windows_are_warned_of(lines, tokenizer, caplog):
    calibration_samples(spec(f"{lines}#0:0.1", "wikitext2_gptq", 50, 32), tokenizer)
    assert "overlap" in caplog.text


def test_long_text_brings_no_warning_about_its_length(lines, tokenizer, caplog, capfd):
    calibration_samples(spec(lines, "sequential", 4, 64), tokenizer)
    assert "longer than" not in caplog.text + capfd.readouterr().err


@pytest.mark.parametrize(
    ("preproc", "n", "seq_len", "says"),
    [
        ("sequential", 100, 16, r"1180 tokens\n.*n_samples to 73 or less or seq_len to 11 or less"),
        ("sequential", 1, 2000, r"1180 tokens\n.*seq_len to 1180 or less"),
        ("wikitext2_gptq", 2, 5000, r"1181 tokens\n.*seq_len to 1181 or less"),
        ("c4_gptq", 2, 50, r"longest has 50 tokens\n.*seq_len to 49 or less"),
        ("pileval_awq", 100, 16, r"1220 tokens together\n.*n_samples to 76 or less or seq_len to 12"),
        ("txt_general_preproc", 10, 45, r"6 of its 40 documents.*\n.*n_samples to 6 or less or seq_len to 41 or less"),
        ("txt_general_preproc", 1, 99, r"0 of its 40 .* longest has 50\n.*seq_len to 50 or less"),
        ("pileval_smooth", 41, 8, r"40 documents\n.*n_samples to 40 or less"),
        ("original_txt", 41, None, r"40 documents\n.*n_samples to 40 or less"),
        ("original_txt", 4, 8, "whole, but seq_len is 8"),
        ("sequential", 4, None, "needs a sample length"),
        ("sequential", 0, 8, "n_samples is 0"),
        ("general", 4, 8, r"no preset 'general'\n.*wikitext2_gptq"),
    ],
)
def test_too_little_text_and_wrong_options(lines, tokenizer, preproc, n, seq_len, says):
    with pytest.raises(DataError, match=f"(?s){says}"):
        calibration_samples(spec(lines, preproc, n, seq_len), tokenizer)


@pytest.mark.parametrize("preproc", list(PRESETS))
def test_empty_text_is_an_error_for_every_preset(tmp_path, tokenizer, preproc):
    (tmp_path / "blank.txt").write_text("\n  \n\n")
    length = None if PRESETS[preproc].whole_documents else 8
    with pytest.raises(DataError, match=r"no text|0 tokens|has 1 tokens"):
        calibration_samples(spec(tmp_path / "blank.txt", preproc, 2, length), tokenizer)


def test_a_template_needs_documents_and_a_tokenizer_that_has_one(lines, tokenizer):
    with pytest.raises(DataError, match="joins the whole text"):
        calibration_samples(spec(lines, "sequential", 1, 8, apply_chat_template=True), tokenizer)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(DataError, match="has none"):
            calibration_samples(spec(lines, "ultrachat_general", 1, 8), tokenizer)
        tokenizer.chat_template = "{{ raise_exception('only system') }}"
        with pytest.raises(DataError, match="only system"):
            calibration_samples(spec(lines, "ultrachat_general", 1, 8), tokenizer)
    finally:
        tokenizer.chat_template = template


MIX_STARTS = {"wikitext2": 0, "ptb": 100, "c4": 200}  # words that no other set has


def test_the_mix_is_a_third_of_each_set_drawn_with_one_seed(tmp_path, tokenizer):
    """RPTQ's: windows of wikitext2 and of ptb, both joined by two newlines, then of random documents of c4."""
    sets = {name: [words(at + i, at + i + 30) for i in range(40)] for name, at in MIX_STARTS.items()}
    for name, texts in sets.items():
        field = "sentence" if name == "ptb" else "text"
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({field: texts})}).save_to_disk(tmp_path / name)
    mixed = CalibrationSpec("mix", str(tmp_path), False, 6, 16, "mix_gptq", seed=2)
    samples = calibration_samples(mixed, tokenizer)
    assert len(samples) == 6
    for place, (name, texts) in enumerate(sets.items()):
        generator = random.Random(2)
        for sample in samples[2 * place : 2 * place + 2]:
            text = texts[generator.randint(0, len(texts) - 1)] if name == "c4" else "\n\n".join(texts)
            tokens = tokenizer(text)["input_ids"]
            start = generator.randint(0, len(tokens) - 16 - 1)
            assert sample.tolist() == tokens[start : start + 16]


def test_the_mix_needs_a_multiple_of_three(tmp_path, tokenizer):
    with pytest.raises(DataError, match="n_samples is 128"):
        calibration_samples(CalibrationSpec("mix", str(tmp_path), False, 128, 16, "mix_gptq"), tokenizer)
