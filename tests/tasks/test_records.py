"""Users' own data: every kind of record, and every way in which one can be wrong."""

from __future__ import annotations

import json

import pytest

from llmc.cli import main
from llmc.data.records import Chat, Prompt, Question, Text, check_records, read_records
from llmc.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
GOOD = [{"text": "a b"}, {"prompt": "c", "completion": "d", "id": 7}, CHAT, {"question": "e?", "answer": "f"}]


def write(folder, *lines, name="mine.jsonl"):
    file = folder / name
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


def test_every_kind_is_read(tmp_path):
    found = read_records(write(tmp_path, GOOD[0], "", *GOOD[1:]))
    assert [one.record for one in found] == [
        Text(text="a b"),
        Prompt(prompt="c", completion="d"),
        Chat.model_validate(CHAT),
        Question(question="e?", answer="f"),
    ]
    assert [one.where for one in found] == [f"mine.jsonl, line {number}" for number in (1, 3, 4, 5)]
    assert found[2].record.turns == CHAT["messages"][:1]


def test_lines_of_text_and_a_list_of_samples_are_records_too(tmp_path):
    lines = write(tmp_path, "one two", "", "three", name="mine.txt")
    assert [(one.record.prompt, one.where[-1]) for one in read_records(lines)] == [("one two", "1"), ("three", "3")]
    (tmp_path / "samples.json").write_text(json.dumps([{"question": "e?", "image": "x.png"}]))
    assert [one.record for one in read_records(tmp_path)] == [Question(question="e?")]


BAD = {
    "no-field": (
        {"txt": "a"},
        "has none of the fields 'text', 'prompt', 'messages' and 'question'; its fields are 'txt'",
    ),
    "number": ({"text": 3}, "field 'text' holds int, not text"),
    "blank": ({"prompt": "  "}, "field 'prompt' is blank"),
    "role": ({"messages": [{"role": "bot", "content": "a"}]}, "field 'messages.0.role' is 'bot', not 'system'"),
    "content": ({"messages": [{"role": "user"}]}, "field 'messages.0.content' is missing"),
    "no-user": ({"messages": [{"role": "system", "content": "a"}]}, "field 'messages' has no turn of the user"),
    "list": ([1], "is list, not an object"),
    "completion": ({"prompt": "a", "completion": []}, "field 'completion' holds list, not text"),
    "json": ('{"text": ', "isn't valid JSON: Expecting value at column 10"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_with_its_line_and_field(tmp_path, name):
    line, said = BAD[name]
    with pytest.raises(DataError) as caught:
        read_records(write(tmp_path, GOOD[0], line))
    assert f"mine.jsonl, line 2{':' if said.startswith('field') else ''} {said}" in str(caught.value)


def test_a_check_goes_on_behind_what_is_wrong(tmp_path):
    found = check_records(write(tmp_path, *[line for line, _ in BAD.values()], *GOOD))
    assert len(found.problems) == len(BAD)
    assert found.records == {"text": 1, "prompt": 1, "messages": 1, "question": 1}
    assert found.further == {"id": 1} and found.characters == 3 + 2 + 4 + 3


def test_the_command_line_shows_what_a_file_holds(tmp_path, capsys):
    assert main(["check-data", str(write(tmp_path, *GOOD))]) == 0
    shown = capsys.readouterr().out
    assert "1 text, 1 prompt, 1 messages, 1 question" in shown and "id (1)" in shown
    assert main(["check-data", str(write(tmp_path, *GOOD, BAD["blank"][0]))]) == 1
    assert "FOUND mine.jsonl, line 5: field 'prompt' is blank" in capsys.readouterr().out
    assert main(["check-data", str(tmp_path / "gone.jsonl")]) == 2


@pytest.mark.parametrize(("name", "said"), [("mine.csv", "none of .jsonl"), ("mine.jsonl", "holds no records")])
def test_a_file_without_records_is_refused(tmp_path, name, said):
    with pytest.raises(DataError, match=said):
        read_records(write(tmp_path, name=name))
