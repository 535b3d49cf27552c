"""Refusing examples: every message starts with the file and the line, and says what is wrong there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foreword.data import read_examples
from foreword.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(source: object, *parts: str, **options: object) -> str:
    """Assert that reading fails with a DataError that has all the parts; return the message."""
    with pytest.raises(DataError) as caught:
        read_examples(source, **options)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("d.jsonl", "", 1, "empty"),
        ("d.jsonl", "\n \n", 1, "empty"),
        ("d.json", "", 1, "empty"),
        ("d.json", "[ ]", 1, "empty"),
        ("d.csv", "", 1, "empty"),
        ("d.csv", "input,output\n", 1, "empty"),
        ("d.jsonl", '{"text": "a"}\n{"text": }', 2, "malformed JSON at column 10"),
        ("d.jsonl", '{"text": "a"}\n{"text": "b"} x', 2, "malformed JSON at column 15"),
        ("d.jsonl", '{"text": "a"}\n["b"]\n', 2, "found a list"),
        ("d.jsonl", '{"text": "a"}\n3\n', 2, "found a number"),
        ("d.jsonl", '{"text": "a"}\nnull\n', 2, "found null"),
        ("d.jsonl", '{"text": "a"}\n' + "[" * 200_000, 2, "JSON"),
        ("d.jsonl", '{"text": "a"}\n{"text": "b", "n": ' + "9" * 5000 + "}", 2, "Python cannot hold"),
        ("d.json", '{"text": "a"}', 1, "one list of objects"),
        ("d.json", '[\n{"text": "a"},\n{"text": oops}]', 3, "malformed JSON at column 10"),
        ("d.json", '[\n{"text": "a"}\n{"text": "b"}]', 3, "malformed JSON at column 1: expected ','"),
        ("d.json", '[\n{"text": "a"},\n]', 3, "comma before"),
        ("d.json", '[{"text": "a"}]\n x', 2, "malformed JSON at column 2: something follows"),
        ("d.json", '[{"text": "a"}', 1, "malformed JSON at column 15"),
        ("d.json", '[{"text": "a"},\n"b"]', 2, "found a string"),
        ("d.csv", 'input,output\n"a\nb",c\nd\n', 4, "1 fields, but the header has 2"),
        ("d.csv", "input,output\na,b,c\n", 2, "3 fields, but the header has 2"),
        ("d.csv", 'input,output\na,b\n"c,d\ne,f\n', 3, "malformed row"),
        ("d.csv", "input,output,input\na,b,c\n", 1, "twice: 'input'"),
        ("d.csv", "question,answer\na,b\n", 2, "Found: 'question', 'answer'. Expected 'messages'; or"),
        ("d.csv", "input,output\na,b\nc,\n", 3, "'output' is blank"),
        ("d.jsonl", '{"text": "a"}\n{"text": " \\n"}', 2, "'text' is blank"),
        ("d.jsonl", '{"text": "a"}\n{"text": 3}', 2, "'text' must be a string, not int 3"),
        ("d.jsonl", '{"input": 3, "output": "a"}', 1, "'input' must be a string, not int 3"),
        ("d.jsonl", '{"input": "a", "output": ["b"]}', 1, "'output' must be a string, not list ['b']"),
        ("d.jsonl", '{"input": "a", "references": []}', 1, "'references' must be a list"),
        ("d.jsonl", '{"input": "a", "references": "b"}', 1, "'references' must be a list"),
        ("d.jsonl", '{"input": "a", "references": ["b", ""]}', 1, "'references[1]' is blank"),
        ("d.jsonl", '{"text": "ab\\ud800"}', 1, "surrogate pair at character 2"),
        ("d.jsonl", '{"inptu": "a", "output": "b"}', 1, "columns={'input': 'question'"),
    ],
)
def test_refusals_name_file_and_line(tmp_path: Path, name: str, content: str, line: int, words: str) -> None:
    path = write(tmp_path, name, content)
    assert refused(path, words).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "'messages' must be a list"),
        ("hello", "'messages' must be a list"),
        (["hello"], "'messages[0]' must be an object"),
        ([{"role": "assistant", "content": "a"}], "only the answer"),
        ([{"role": "user", "content": "a"}], "must be the assistant's"),
        ([{"role": "bot", "content": "a"}], "messages[0].role is 'bot'. The roles are assistant, developer"),
        ([{"content": "a"}], "messages[0].role is None"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role is ['user']"),
        ([{"role": "user", "content": 3}], "'messages[0].content' must be a string"),
        ([{"role": "user"}], "'messages[0].content' must be a string, not null"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "content' is blank"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}], "content' must be a"),
    ],
)
def test_bad_messages_name_file_and_line(tmp_path: Path, messages: object, words: str) -> None:
    path = write(tmp_path, "d.jsonl", "\n" + json.dumps({"messages": messages}))
    assert refused(path, words).startswith(f"{path}:2: ")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("name", "head"), [("d.jsonl", b'{"text": "\xc3\xa9"}\n'), ("d.csv", b"text\n")])
def test_bad_utf8_names_line_and_byte(tmp_path: Path, bom: bytes, name: str, head: bytes) -> None:
    content = bom + head + b'{"text": "caf\xe9"}\n'
    path = write(tmp_path, name, content)
    message = refused(path, f"byte offset {content.index(b'caf') + 3} of the file (byte 0xe9)")
    assert message.startswith(f"{path}:2: ")


def test_bad_utf8_right_after_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", b"\xef\xbb\xbfte\xe9xt\na\n")
    assert refused(path, "byte offset 5 of the file (byte 0xe9)").startswith(f"{path}:1: ")


def test_utf16_is_recognised(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", "text\na\n".encode("utf-16"))
    assert refused(path, "byte offset 0", "UTF-16").startswith(f"{path}:1: ")


def test_other_refusals_of_files(tmp_path: Path) -> None:
    refused(tmp_path / "none.jsonl", "none.jsonl: there is no such file")
    refused(write(tmp_path, "d.docx", "x"), "d.docx: cannot read", "'.docx'", ".jsonl, .ndjson, .json, .csv")
    refused(write(tmp_path, "d.parquet", "not parquet"), "d.parquet[0]: cannot be read as parquet")
    refused(write(tmp_path, "d.jsonl", '{"text": "a"}'), "d.jsonl: split='train'", split="train")
    refused(tmp_path, "not written by datasets.save_to_disk")
    write(tmp_path, "state.json", "{}")
    refused(tmp_path, "the saved dataset cannot be loaded")


def test_other_refusals_in_memory() -> None:
    refused([], "list: it is empty")
    refused("", "empty string")
    refused(3, "from a int")
    refused([{"text": "a"}, "b"], "list[1]: expected a dict, found a str")
    refused({"input": "a", "output": "b"}, "expected a list of records")
    refused([{"text": "a"}], "has no splits", split="train")
