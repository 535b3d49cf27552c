"""Reading examples: every source, every record shape, and the place named in every refusal."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.data import Example, read_examples
from foreword.errors import DataError

TWO = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]


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


def pairs(examples: list[Example]) -> list[tuple[str, str]]:
    return [(example.input, example.output) for example in examples]


# --- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "JSONL"])
def test_jsonl_skips_blank_lines_and_keeps_line_numbers(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, f"d.{suffix}", '\n{"input": "a", "output": "b"}\n  \n{"input": "c", "output": "d"}')
    examples = read_examples(path)
    assert examples == [Example("a", "b", f"{path}:2"), Example("c", "d", f"{path}:4")]
    assert read_examples(str(path)) == examples


def test_json_list_gives_each_item_its_line(tmp_path: Path) -> None:
    text = '\n[\n {"input": "a", "output": "b"}\n ,\n\n {"input": "c",\n "output": "d"}, {"text": "e"}]\n'
    path = write(tmp_path, "d.json", text)
    assert [example.source for example in read_examples(path)] == [f"{path}:3", f"{path}:6", f"{path}:7"]


def test_csv_counts_lines_through_quoted_fields(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", 'input,output\r\n"one\ntwo","say ""hi"""\r\n\r\nx,y\r\n')
    assert read_examples(path) == [
        Example("one\ntwo", 'say "hi"', f"{path}:2"),
        Example("x", "y", f"{path}:5"),
    ]


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    long = "word " * 60_000
    path = write(tmp_path, "d.csv", f"text\n{long}\n")
    assert pairs(read_examples(path)) == [("", long)]


def test_tsv(tmp_path: Path) -> None:
    path = write(tmp_path, "d.tsv", "input\toutput\na, b\tc\n")
    assert pairs(read_examples(path)) == [("a, b", "c")]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(TWO), path)
    assert read_examples(path) == [Example("a", "b", f"{path}[0]"), Example("c", "d", f"{path}[1]")]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_byte_order_mark_is_tolerated(tmp_path: Path, name: str) -> None:
    content = {
        "d.jsonl": '{"text": "é"}\n',
        "d.json": '[{"text": "é"}]',
        "d.csv": "text\né\n",
    }[name]
    assert pairs(read_examples(write(tmp_path, name, b"\xef\xbb\xbf" + content.encode()))) == [("", "é")]


def test_nan_beside_the_text_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", '{"text": "a", "score": NaN, "x": -Infinity}\n')
    assert pairs(read_examples(path)) == [("", "a")]


def test_line_separators_inside_json_strings_do_not_split_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", '{"text": "a\u2028b\x85c"}\n{"text": "d"}\n')
    assert [(e.output, e.source) for e in read_examples(path)] == [
        ("a\u2028b\x85c", f"{path}:1"),
        ("d", f"{path}:2"),
    ]


def test_saved_dataset(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(TWO)
    data.save_to_disk(tmp_path / "one")
    assert pairs(read_examples(tmp_path / "one")) == [("a", "b"), ("c", "d")]
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "many")
    folder = tmp_path / "many"
    assert read_examples(folder, split="test") == [Example("c", "d", f"{folder}[0]")]
    refused(folder, str(folder), "several splits", "'train', 'test'", "split=")
    refused(folder, "no split 'dev'", "'train', 'test'", split="dev")


def test_in_memory() -> None:
    assert [e.source for e in read_examples(TWO)] == ["list[0]", "list[1]"]
    data = datasets.Dataset.from_list(TWO)
    assert [e.source for e in read_examples(data)] == ["dataset[0]", "dataset[1]"]
    assert pairs(read_examples(datasets.DatasetDict(train=data))) == [("a", "b"), ("c", "d")]
    streamed = data.to_iterable_dataset()
    assert pairs(read_examples(streamed, limit=1)) == [("a", "b")]


def test_a_dataset_formatted_as_tensors_is_read_as_values() -> None:
    data = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    data.set_format("torch")
    assert pairs(read_examples(data, where={"label": "1"})) == [("", "a")]


def test_named_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*arguments: object, **options: object) -> object:
        calls.append((arguments, options))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(TWO))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_examples("org/some-name:config.a")[0] == Example("a", "b", "org/some-name:config.a[0]")
    read_examples("name", split="train")
    assert calls == [(("org/some-name", "config.a"), {"split": None}), (("name", None), {"split": "train"})]


def test_named_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> object:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets, "load_dataset", load)
    refused("org/name", "org/name:", "no such file", "offline mode is enabled", "save_to_disk")


def test_a_mistyped_path_is_not_looked_up_as_a_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("looked up"))
    for source in ("train.jsonl", "data/train.txt", "./train", "../data/train", "/no/such", Path("train")):
        refused(source, "no such file")


# --- record shapes ----------------------------------------------------------------------------------------


def test_references_give_one_example_each() -> None:
    examples = read_examples([{"input": "a", "references": ["x", "y"]}, {"input": "b", "references": ["z"]}])
    assert [(e.input, e.output, e.source) for e in examples] == [
        ("a", "x", "list[0]"),
        ("a", "y", "list[0]"),
        ("b", "z", "list[1]"),
    ]


def test_messages_are_kept() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Hi.", "tool_calls": None},
    ]
    (example,) = read_examples([{"messages": messages}])
    assert (example.input, example.output) == ("Be brief.\nHi?", "Hi.")
    assert example.messages == (*messages[:2], {"role": "assistant", "content": "Hi."})


def test_an_assistant_that_calls_a_tool_may_say_nothing() -> None:
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "No."},
    ]
    (example,) = read_examples([{"messages": messages}])
    assert example.output == "No."
    messages[2]["content"] = None
    refused([{"messages": messages}], "messages[2].content")


def test_columns_are_mapped_and_decide_the_shape() -> None:
    record = {"question": "q", "answer": "a", "input": "i", "output": "o", "text": "t", "body": "b"}
    assert pairs(read_examples([record])) == [("i", "o")]
    assert pairs(read_examples([record], columns={"input": "question", "output": "answer"})) == [("q", "a")]
    assert pairs(read_examples([record], columns={"input": "question"})) == [("q", "o")]
    assert pairs(read_examples([record], columns={"text": "body"})) == [("", "b")]
    refused([record], "list[0]", "columns are missing", "'question'", "'answr'", columns={"output": "answr"})
    refused([record], "unknown name 'prompt'", columns={"prompt": "question"})
    refused([record], "'output', 'text'", columns={"output": "answer", "text": "body"})


def test_columns_that_a_table_filled_with_null_do_not_count() -> None:
    data = datasets.Dataset.from_list([{"input": "a", "output": "b", "text": None}, {"text": "t"}])
    assert pairs(read_examples(data)) == [("a", "b"), ("", "t")]
    refused([{"input": "a", "output": None}], "list[0]", "'output' must be a string, not null")


def test_limit_counts_examples_and_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", '{"input": "a", "references": ["x", "y", "z"]}\nbroken')
    assert [e.output for e in read_examples(path, limit=2)] == ["x", "y"]
    for limit in (0, -1, True, 1.5):
        refused(path, "limit", limit=limit)


def test_where(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", "text,label,lang\na,1,en\nb,0,en\nc,1,de\n")
    assert [e.output for e in read_examples(path, where={"label": "1"})] == ["a", "c"]
    assert [e.output for e in read_examples(path, where={"label": "1", "lang": "de"})] == ["c"]
    assert [e.output for e in read_examples(path, where={"label": "0", "lang": "en"})] == ["b"]
    refused(path, f"{path}:4", "leaves nothing", "'label' holds '1', '0'", where={"label": "2"})
    refused(path, f"{path}:2", "'lable'", "'text', 'label', 'lang'", where={"lable": "1"})


def test_where_compares_as_strings() -> None:
    data = [{"text": str(i), "v": v} for i, v in enumerate([1, "1", True, None, 1.5])]
    for value, found in (("1", ["0", "1"]), ("true", ["2"]), ("null", ["3"]), ("1.5", ["4"])):
        assert [e.output for e in read_examples(data, where={"v": value})] == found


# --- properties -------------------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8"), max_size=30)
output = text.filter(lambda value: value.strip())
records = st.lists(st.tuples(text, output), min_size=1, max_size=8)


@settings(deadline=None)
@given(records)
def test_any_text_survives_every_format(tmp_path_factory: pytest.TempPathFactory, expected: list) -> None:
    folder = tmp_path_factory.mktemp("formats")
    rows = [{"input": a, "output": b} for a, b in expected]
    write(folder, "d.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    write(folder, "d.json", json.dumps(rows, ensure_ascii=False, indent=1))
    with (folder / "d.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("input", "output"), *expected])
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    for name in ("d.jsonl", "d.json", "d.csv", "d.parquet"):
        assert pairs(read_examples(folder / name)) == expected, name


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", "x", "x\ny", "\n\n"]), min_size=1, max_size=6))
def test_csv_lines_are_where_the_rows_are(tmp_path_factory: pytest.TempPathFactory, fields: list) -> None:
    content = "input,output\n" + "".join(f'"{field}",row{index}\n' for index, field in enumerate(fields))
    path = write(tmp_path_factory.mktemp("lines"), "d.csv", content)
    for index, example in enumerate(read_examples(path)):
        line = int(re.findall(r":(\d+)$", example.source)[0])
        # The row's start: its own line breaks and everything behind it lie further down.
        assert content.split("\n")[line - 1].startswith('"')
        assert f"row{index}\n" in "\n".join(content.split("\n")[line - 1 :])
        assert line == 2 + index + sum(field.count("\n") for field in fields[:index])


def test_reading_needs_neither_torch_nor_datasets() -> None:
    # foreword itself may import torch; the data room must not, so it is imported below an empty package.
    import foreword

    code = (
        "import sys, types; package = types.ModuleType('foreword'); "
        f"package.__path__ = [{str(Path(foreword.__file__).parent)!r}]; sys.modules['foreword'] = package; "
        "import foreword.data.examples; "
        "print([m for m in ('torch', 'datasets', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_gives_everything_it_names() -> None:
    import foreword.data
    from foreword.data.encode import EncodedDataset

    for name in foreword.data.__all__:
        assert callable(getattr(foreword.data, name)), name
    assert foreword.data.EncodedDataset is EncodedDataset
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = foreword.data.nothing_here
