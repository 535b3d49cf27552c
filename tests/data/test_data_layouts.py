"""The columns of a record: which are the prompt and the answer, what is not used, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foreword.data import Example, read_examples
from foreword.data._say import speaking
from foreword.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TASK = "Below is an instruction that describes a task"


def one(record: dict[str, Any], **options: Any) -> Example:
    """The example of a record all of whose columns are used."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (example,) = read_examples([record], **options)
    return example


def refused(record: dict[str, Any], *parts: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        read_examples([record], **options)
    for part in ("list[0]", *parts):
        assert part in str(caught.value)


# --- instructions -----------------------------------------------------------------------------------------


def test_instruction_and_input_are_alpacas_prompt() -> None:
    example = one({"instruction": "Translate to French", "input": "cat", "output": "chat"})
    assert (example.input, example.output, example.layout) == (
        f"{TASK}, paired with an input that provides further context. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nTranslate to French\n\n### Input:\ncat\n\n### Response:\n",
        "chat",
        "alpaca",
    )
    plain = (
        f"{TASK}. Write a response that appropriately completes the request.\n\n### Instruction:\nHi\n\n### Response:\n"
    )
    for empty in ({"input": ""}, {"input": " "}, {"input": None}, {}):
        assert one({"instruction": "Hi", **empty, "output": "Hello"}).input == plain


def test_relatives_of_alpaca() -> None:
    dolly = one({"instruction": "i", "context": "c", "response": "r"})
    assert "### Input:\nc\n\n### Response:\n" in dolly.input and dolly.output == "r"
    assert one({"instruction": "i", "output": "o", "system": "Be brief."}).input.startswith("Be brief.\n\n### Instr")
    with pytest.warns(UserWarning, match="columns not used: text"):  # tatsu-lab's has the whole prompt once more
        (example,) = read_examples([{"instruction": "i", "input": "", "output": "o", "text": "i o"}])
    assert example.output == "o"
    assert one({"task": "i", "input": "x", "out": "o"}, columns={"instruction": "task", "output": "out"}).output == "o"
    refused({"instruction": "i", "output": "o", "response": "r"}, "several ways", "'output': 'response'")


def test_inputs_and_outputs_as_conversations() -> None:
    record = {"instruction": "Translate", "input": "cat", "output": "chat", "system": "Be brief."}
    system, user, answer = one(record, chat=True).messages or ()
    assert [system["content"], user["content"], answer["content"]] == ["Be brief.", "Translate\ncat", "chat"]
    example = one({"instruction": "i", "output": "o", "history": [["a", "b"]]}, chat=True)
    assert [m["content"] for m in example.messages or ()] == ["a", "b", "i", "o"]
    assert one({"question": "q", "answer": "a"}, chat=True).messages == (USER, ANSWER)
    refused({"input": "", "output": "a"}, "the input is blank", chat=True)
    refused({"instruction": "i", "output": "o", "history": ["a"]}, "'history' must be a list of", chat=True)


# --- texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["completion", "response", "answer", "output"])
def test_prompt_and_completion(answer: str) -> None:
    example = one({"prompt": "p", answer: " c"})
    assert (example.input, example.output, example.messages) == ("p", " c", None)


def test_what_is_not_used_is_named_with_how_to_use_it() -> None:
    for record, unused, advice in (
        ({"input": "q", "output": "a", "context": "c"}, ["context"], "columns={'input': 'context'}"),
        ({"input": "q", "output": "a", "instruction": None, "other": ""}, [], ""),
        ({"text": "t", "label": 0}, ["label"], "where={'label': 'VALUE'}"),
        ({"prompt": "p", "completion": "c", "label": False}, ["label"], "where={'label': 'VALUE'}"),
        ({"input": "q", "output": "a", "system": "s", "tools": [{"name": "f"}]}, ["system", "tools"], "chat=True"),
        ({"messages": [USER, ANSWER], "id": 3, "score": np.zeros(2)}, ["id", "score"], ""),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read_examples([record, record])
        assert found.unused == dict.fromkeys(unused, 2) and len(found) == 2
        said = [str(w.message) for w in caught]
        assert said == ([found.describe_unused()] if unused else []) and advice in found.describe_unused()
        assert not unused or found.describe_unused().startswith(f"columns not used: {', '.join(unused)}")
    with pytest.warns(UserWarning, match=r"not used: instruction .*'instruction': 'instruction'.* into the prompt"):
        read_examples([{"instruction": "i", "a": "x", "b": "y"}], columns={"input": "a", "output": "b"})
    one({"text": "t", "label": 1}, where={"label": "1"})


def test_what_is_ambiguous_is_refused_with_the_ways() -> None:
    both = {"prompt": "p", "completion": "c", "response": "r"}
    refused(both, "'completion', 'response' can be read", "{'input': 'prompt', 'output': 'completion'} or columns=")
    with pytest.warns(UserWarning, match="not used: completion"):
        read_examples([both], columns={"output": "response"})
    refused({"prompt": "p", "completion": "c", "text": "t"}, "several ways", "columns={'text': 'text'}")
    assert one({"prompt": "p", "completion": "c", "text": None}).output == "c", "tables fill what is absent with null"
    # Our own names come first, in their order.
    with pytest.warns(UserWarning, match="not used: prompt, completion, text"):
        (example,) = read_examples([{"input": "i", "output": "o", "prompt": "p", "completion": "c", "text": "t"}])
    assert example.output == "o"


def test_a_refusal_says_which_option_would_read_the_record() -> None:
    for record, columns in (
        ({"question": "q", "answer": "a"}, {"input": "question", "output": "answer"}),
        ({"Input": "q", "Output": "a"}, {"input": "Input", "output": "Output"}),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, {"input": "prompt", "output": "chosen"}),
        ({"body": "b", "n": 1}, {"text": "body"}),
        ({"dialog": [USER, ANSWER]}, {"messages": "dialog"}),
        ({"x": "1", "y": "2"}, {"input": "x", "output": "y"}),
    ):
        refused(record, f"columns={columns!r}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert len(read_examples([record], columns=columns)) == 1
        with speaking("cli"):
            refused(record, " ".join(f"--column {ours}={theirs}" for ours, theirs in columns.items()))
        with speaking("yaml"):
            refused(record, f"columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in columns.items())}}}")
    refused({"question": "q", "answer": "a"}, "or chat=True to put both into the model's chat template")
    refused({"input;output": "a;b"}, "looks separated by a semicolon")
    refused(
        {"input": "a", "output": "b", "system": "s"}, "is for conversations", "chat=True", columns={"system": "system"}
    )


# --- conversations ----------------------------------------------------------------------------------------


def test_prompt_and_completion_as_messages_learn_the_completion() -> None:
    example = one({"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "tools": [{"name": "f", "parameters": {}}]})
    assert example.messages == (USER, ANSWER, USER, ANSWER) and example.learned_from == 3
    assert example.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    mixed = one({"input": [USER], "output": "a", "system": "s"})
    assert mixed.messages == ({"role": "system", "content": "s"}, USER, ANSWER) and mixed.learned_from == 2


def test_sharegpt() -> None:
    call = {"name": "f", "arguments": {"a": 1}}
    said = [
        ("system", "s"), ("human", "q"), ("function_call", json.dumps(call)), ("observation", "1"), ("gpt", "a"),
    ]  # fmt: skip
    example = one({"conversations": [{"from": who, "value": what} for who, what in said], "tools": '[{"name": "f"}]'})
    assert example.messages == (
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "1"},
        ANSWER,
    )
    assert example.tools == ({"type": "function", "function": {"name": "f"}},)
    with_system = one(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}
    )
    assert (with_system.messages or ())[0] == {"role": "system", "content": "s"}
    refused({"conversations": [{"from": "bot", "value": "q"}]}, "conversations[0].from is 'bot'", "human, user, gpt")
    refused({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "text that is not JSON")
    refused({"messages": [{"role": "system", "content": "x"}, ANSWER], "system": "s"}, "Which of the two is meant?")


def test_openais_exports() -> None:
    parts = [{"type": "text", "text": "q1 "}, {"type": "text", "text": "q2"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    example = one(
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    )
    assert example.messages == ({"role": "user", "content": "q1 q2"}, {"role": "assistant", "tool_calls": [call]})
    assert json.loads(example.output) == [call["function"]], "an answer that is only a tool call is one"
    older = one({"messages": [USER, {"role": "assistant", "content": None, "function_call": call["function"]},
                              {"role": "function", "name": "f", "content": "3"}, ANSWER]})  # fmt: skip
    assert (older.messages or ())[1]["tool_calls"] == [{"type": "function", "function": call["function"]}]
    assert (older.messages or ())[2]["role"] == "tool"
    assert one({"messages": json.dumps([USER, ANSWER])}).messages == (USER, ANSWER), "as a .csv has it"
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    refused({"messages": [{"role": "user", "content": picture}, ANSWER]}, "only parts of text are read")
    refused({"messages": [USER, {**ANSWER, "tool_calls": [{"id": 1}]}]}, "messages[1].tool_calls[0]")
    refused({"messages": [USER, {**ANSWER, "weight": 2}]}, "messages[1].weight is 2")
    refused({"messages": [USER, {**ANSWER, "weight": 0}]}, "every answer has a weight of 0")
    refused({"messages": [USER, ANSWER], "tools": "f"}, "'tools' is text that is not JSON")
    refused({"messages": [USER, ANSWER], "tools": [3]}, "'tools' must be a list of objects")


def test_tables_of_tools_lose_the_nulls_that_tables_put_there(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, ANSWER], "tools": [{"name": "f", "parameters": {"a": 1}}]},
        {"messages": [USER, ANSWER], "tools": [{"name": "g", "parameters": {"b": 2}}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for source in (tmp_path / "d.parquet", datasets.Dataset.from_list(rows)):
        first, second = read_examples(source)
        assert (first.tools or ())[0]["function"] == {"name": "f", "parameters": {"a": 1}}
        assert (second.tools or ())[0]["function"] == {"name": "g", "parameters": {"b": 2}}


# --- sources ----------------------------------------------------------------------------------------------


def test_packed_several_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "a.jsonl.gz": '{"text": "a"}\n',
        "b.csv.gz": "text\nb\n",
        "c.json.gz": '[{"text": "c"}]',
        "d.tsv.gz": "text\nd\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    (tmp_path / "e.jsonl").write_text('\n{"text": "e"}\n')
    for name in files:
        assert [e.output for e in read_examples(tmp_path / name)] == [name[0]]
    found = read_examples([tmp_path / "e.jsonl", str(tmp_path / "a.jsonl.gz")])
    assert [(e.output, e.source) for e in found] == [
        ("e", f"{tmp_path / 'e.jsonl'}:2"), ("a", f"{tmp_path / 'a.jsonl.gz'}:1"),
    ]  # fmt: skip
    assert [e.output for e in read_examples(str(tmp_path / "*.jsonl*"))] == ["a", "e"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "z"}\n')))
    assert read_examples("-") == [Example("", "z", "-:1")]


def test_refusals_of_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-12])
    (tmp_path / "b.jsonl.gz").write_text("not packed")
    (tmp_path / "c.parquet.gz").write_bytes(gzip.compress(b"x"))
    same = tmp_path / "d.jsonl"
    same.write_text('{"text": "a"}\n')
    for source, words in (
        (tmp_path / "a.jsonl.gz", "a.jsonl.gz: cannot be read: Compressed file ended"),
        (tmp_path / "b.jsonl.gz", "b.jsonl.gz: cannot be read: Not a gzipped file"),
        (tmp_path / "c.parquet.gz", "'.parquet.gz'"),
        (tmp_path / "none.jsonl.gz", "no such file"),
        (str(tmp_path / "e*.jsonl"), "no file is called so"),
        ([same, same], "given twice"),
    ):
        with pytest.raises(DataError) as caught:
            read_examples(source)  # type: ignore[arg-type]
        assert words in str(caught.value)
