"""samples.json and images become what the model's own processor makes of them; what is wrong is said at once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import make_processor, write_samples
from tiny_vision import IMAGE

from llmc.data import ImageTextSpec, image_text_samples
from llmc.errors import DataError


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write_samples(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "questions"))


@pytest.fixture(scope="module", params=["llava", "gemma3"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    return make_processor(family)


@pytest.fixture(scope="module")
def llava():
    return make_processor("llava")


def spec(folder: Path, family: str = "llava", **changes) -> ImageTextSpec:
    mark = {"llava": "<image>", "gemma3": "<start_of_image>"}[family]
    return replace(ImageTextSpec(folder, 3, None, mark, IMAGE), **changes)


@pytest.mark.parametrize("add_answer", [False, True])
def test_a_sample_is_what_the_processor_makes_of_image_and_question(written, family, processor, add_answer):
    entries = json.loads((written / "samples.json").read_text())
    mark = spec(written, family).mark
    found = image_text_samples(spec(written, family, add_answer=add_answer), processor)
    for entry, sample in zip(entries, found, strict=True):
        picture = entry["image"]
        lines = [mark * bool(picture), entry["question"], entry["answer"] if add_answer else ""]
        images = [Image.open(written / picture)] if picture else None
        expected = processor(text=["\n".join(filter(None, lines))], images=images, return_tensors="pt")
        assert torch.equal(sample.tokens, expected["input_ids"])
        assert set(sample.further) == (set(expected) - {"input_ids", "attention_mask"} if picture else set())
        for name, tensor in sample.further.items():
            assert torch.equal(tensor, expected[name]), name


def test_the_chat_template_writes_the_turns_and_the_special_tokens(written, family, processor):
    entry = json.loads((written / "samples.json").read_text())[0]
    asked = spec(written, family, apply_chat_template=True, n_samples=1)
    sample, answered = (image_text_samples(replace(asked, add_answer=answer), processor)[0] for answer in (False, True))
    texts = [processor.tokenizer.decode(one.tokens[0]).split() for one in (sample, answered)]
    assert [texts[0][0], texts[0][-1]] == ["user", "assistant"]
    assert texts[0][-1 - len(entry["question"].split()) : -1] == entry["question"].split()
    assert texts[1][-len(entry["answer"].split()) :] == entry["answer"].split()
    assert (sample.tokens == IMAGE).sum() == (answered.tokens == IMAGE).sum() > 0


def test_longer_text_is_cut_with_what_goes_along_with_it(written, family, processor):
    whole = image_text_samples(spec(written, family, add_answer=True), processor)
    length = whole[1].tokens.shape[1] - 2
    cut = image_text_samples(spec(written, family, add_answer=True, seq_len=length), processor)
    assert [one.tokens.shape[1] for one in cut] == [min(length, one.tokens.shape[1]) for one in whole]
    for before, after in zip(whole, cut, strict=True):
        assert torch.equal(before.tokens[:, :length], after.tokens)
        for name, tensor in before.further.items():
            per_token = name == "token_type_ids"
            assert torch.equal(tensor[:, :length] if per_token else tensor, after.further[name])


def test_images_that_do_not_fit_are_refused(written, family, processor):
    last = int((image_text_samples(spec(written, family), processor)[0].tokens[0] == IMAGE).nonzero().max())
    image_text_samples(spec(written, family, n_samples=1, seq_len=last + 1), processor)
    with pytest.raises(DataError, match=rf"the images' tokens end at {last + 1}, calib.seq_len is {last}"):
        image_text_samples(spec(written, family, n_samples=1, seq_len=last), processor)


def test_several_images_and_a_subfolder(folder, llava):
    (folder / "deep").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "deep" / "x.png")
    entry = {"image": ["0.png", "deep/x.png"], "question": "w1"}
    (folder / "samples.json").write_text(json.dumps([entry]))
    sample = image_text_samples(spec(folder, n_samples=1), llava)[0]
    assert (sample.tokens == IMAGE).sum() == 32
    assert sample.further["pixel_values"].shape[0] == 2


GOOD = {"image": "0.png", "question": "w1", "answer": "w2"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "can't be read as JSON"),
        ("{}", "isn't a list of samples"),
        ("[]", "isn't a list of samples"),
        (["w1"], "sample 0 isn't an object"),
        ([{**GOOD, "image": "no.png"}], r"sample 0: there is no image .*no\.png"),
        ([GOOD, {**GOOD, "image": 3}], "sample 1: image is neither a file name nor a list"),
        ([GOOD, {**GOOD, "image": "samples.json"}], "sample 1: .* can't be read as an image"),
        ([{"image": "0.png"}], "sample 0 has no question"),
        ([{**GOOD, "question": 3}], "sample 0: question is int, not text"),
        ([{**GOOD, "answer": ""}], "sample 0 has no answer, and calib.add_answer is on"),
        ([{**GOOD, "audio": "a.wav"}], "sample 0 has audio"),
        ([{**GOOD, "question": "w1 <image>"}], "sample 0: the model's processor refuses it"),
        ([GOOD], "holds 1 samples, calib.n_samples is 2"),
    ],
)
def test_a_malformed_folder_is_refused_with_the_sample(folder, llava, content, said):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "samples.json").write_text(text)
    count = 2 if "n_samples is 2" in said or "sample 1" in said else 1
    with pytest.raises(DataError, match=said):
        image_text_samples(spec(folder, n_samples=count, add_answer=True), llava)


def test_a_missing_file_or_folder_is_named(folder, llava):
    (folder / "samples.json").unlink()
    with pytest.raises(DataError, match=r"has no samples\.json"):
        image_text_samples(spec(folder), llava)
    with pytest.raises(DataError, match="there is no folder"):
        image_text_samples(spec(folder / "nowhere"), llava)


def test_a_processor_without_a_template_says_so(folder):
    processor = make_processor("llava")
    processor.chat_template = None
    with pytest.raises(DataError, match="chat template can't write it"):
        image_text_samples(spec(folder, apply_chat_template=True), processor)
