"""Examples of every shape, and files of predictions."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest

from foreword.errors import DataError
from foreword.evaluate.examples import Task, difference, read_predictions, read_tasks, record_of

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_one_example_a_record_with_all_its_references():
    rows = [{"input": "a", "references": ["x", "y"]}, {"input": "b", "output": "z", "label": 1}, {"messages": CHAT}]
    one, two, chat = read_tasks(rows)
    assert (one.input, one.references, one.source, one.label) == ("a", ("x", "y"), "list[0]", None)
    assert (two.references, two.label, two.prompt) == (("z",), "1", "b")
    assert chat.references == ("hello",) and chat.prompt == (CHAT[0],) and chat.input == "hi"


def test_inputs_alone_and_tagged_words():
    tags = {"tokens": ["In", "San", "Juan"], "tags": ["O", "B-place", "I-place"]}
    alone, tagged = read_tasks([{"input": "go on"}, tags])
    assert alone.references == () and alone.prompt == "go on"
    assert tagged.input == "In San Juan" and tagged.references == ("O B-place I-place",)


def test_columns_split_where_and_limit(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": i % 2, "kind": "a"}) + "\n" for i in range(6)))
    columns = {"input": "text", "output": "kind"}
    found = read_tasks(path, columns=columns, where={"label": "1"}, limit=2)
    assert [(t.input, t.references, t.label) for t in found] == [("t1", ("a",), "1"), ("t3", ("a",), "1")]
    assert found[1].source == f"{path}:4"
    assert [t.references for t in read_tasks(path, columns={"input": "text"}, limit=1)] == [()]


def test_rows_of_equal_input_are_grouped_on_request():
    rows = [{"input": i, "output": o} for i, o in ("ax", "by", "az", "bw", "cv")]
    assert len(read_tasks(rows)) == 5
    found = read_tasks(rows, group=True, limit=2)
    assert [(t.input, t.references) for t in found] == [("a", ("x", "z")), ("b", ("y", "w"))]


def test_the_key_is_about_input_and_references():
    keys = {Task("a", ("x",), "s").key, Task("a", ("x", "y"), "s").key, Task("b", ("x",), "s").key,
            Task("a", ("x",), "elsewhere", label="1").key}  # fmt: skip
    chats = [Task("hi", ("x",), "s", messages=({"role": role, "content": "hi"},)).key for role in ("user", "system")]
    assert len({*keys, *chats}) == 5
    assert len(keys) == 3 and difference(["k"], ["k"]) is None


def test_bad_data_is_refused_with_its_place(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"input": "a", "references": []}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:1: 'references' must be a list"):
        read_tasks(path)
    with pytest.raises(DataError, match="columns are missing"):
        read_tasks([{"question": "a"}])
    path.write_text("")
    with pytest.raises(DataError, match="empty"):
        read_tasks(path)


def test_predictions_in_lines_and_records(tmp_path):
    text, records = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\nthree\u2028 still three\n", encoding="utf-8")
    assert read_predictions(text) == (["one", "", "three\u2028 still three"], None)
    records.write_text('{"prediction": "a", "text": "b", "key": "k1"}\n{"output": "c", "key": "k2"}\n')
    assert read_predictions(records) == (["a", "c"], ["k1", "k2"])
    records.write_text('{"prediction": "a"}\n{"output": 3}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2: no prediction"):
        read_predictions(records)


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\n"])
def test_empty_files_of_predictions(tmp_path, content):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"p\.txt is empty"):
        read_predictions(tmp_path / "p.txt")
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="empty"):
        read_predictions(tmp_path / "p.jsonl")


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_predictions(tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_predictions(tmp_path / "bad.txt")


def test_conversations_keep_their_answers_and_tools():
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [
        {"messages": [{"role": "user", "content": "q"}, call], "tools": tools, "label": "x"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, *others = read_tasks(rows)
    assert json.loads(first.references[0]) == [{"name": "f", "arguments": "{}"}] and first.label == "x"
    assert first.prompt == ({"role": "user", "content": "q"},) and list(first.messages.tools) == tools
    assert first.key != read_tasks([{k: v for k, v in rows[0].items() if k != "tools"}])[0].key
    assert [t.references for t in others] == [("a",), ("a",)] and others[0].key == others[1].key
    for row, task in zip(rows, (first, *others), strict=True):
        again = read_tasks([record_of(task.example)])[0]
        assert again.example == replace(task.example, source="list[0]"), row


def test_unused_columns_and_inputs_alone():
    with pytest.warns(UserWarning, match="columns not used: context"):
        read_tasks([{"input": "a", "output": "b", "context": "c", "label": "x"}])
    for record in ({"input": "a"}, {"instruction": "a"}, {"instruction": "a", "input": "b"}):
        (task,) = read_tasks([record])
        assert task.references == () and "a" in task.input
    (task,) = read_tasks([{"question": "q", "answer": "a"}], chat=True)
    assert (task.prompt, task.references) == (({"role": "user", "content": "q"},), ("a",))
