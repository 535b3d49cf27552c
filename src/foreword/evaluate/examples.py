"""The examples that runs are scored on, and the files that predictions are in."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from foreword.data.examples import Conversation, Example, Unused, by_record
from foreword.data.layouts import candidates
from foreword.data.rows import Row, read_rows
from foreword.errors import DataError

# Under these names a record of a .jsonl file may hold its prediction, in order of preference.
PREDICTION = ("prediction", "predictions", "output", "text")


@dataclass(frozen=True)
class Task:
    """One example to be scored on.

    Attributes:
        input: what the output is made from.
        references: outputs that are right. Empty if the data has none.
        source: where it was read.
        label: what the output is to be (the record's ``label``), if it says.
        messages: the conversation to be answered, if it is one, with its tools.
        example: the same with its answer, for training and for the loss.
    """

    input: str
    references: tuple[str, ...]
    source: str
    label: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    example: Example | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """A short name for what is given and the references, by which runs are found to have seen the same data."""
        tools = getattr(self.messages, "tools", None)
        content = json.dumps([self.prompt, self.references, *([tools] if tools else [])], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def prompt(self) -> str | tuple[Mapping[str, Any], ...]:
        """What a model is given."""
        return self.input if self.messages is None else self.messages


def read_tasks(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    where: Mapping[str, str] | None = None,
    group: bool = False,
    chat: bool = False,
    unused: Unused | None = None,
) -> list[Task]:
    """Examples from the sources and record shapes of :func:`foreword.data.read_examples`, one a record.

    Besides: records with an ``input`` alone have no references; those with lists ``tokens`` and ``tags`` are texts
    whose reference is the tags, with white space between.

    Args:
        group: records of equal input are one example with several references (E2E's CSV files are written so).
        limit: the first so many examples.
        chat: inputs and outputs become conversations.
        unused: counts the columns that nothing is made of; without it, a warning names them.

    Raises:
        DataError: as ``read_examples``; or there are no examples.
    """
    found: list[Task] = []
    left = Unused() if unused is None else unused
    rows = _plain(read_rows(source, split), columns or {}, chat)
    for record, examples in by_record(rows, columns=columns, where=where, chat=chat, unused=left):
        each = list(examples)
        first = each[0]
        label = record.get("label")
        references = tuple(e.output for e in each if not isinstance(e.output, _NoOutput))
        messages = None if first.messages is None else Conversation(first.messages[:-1], first.tools, first.template)
        label = None if label is None else str(label)
        whole = None if messages is None else first
        found.append(Task(first.input, references, first.source, label, messages, whole))
        if len(found) == limit and not group:
            break
    del left["label"]
    if unused is None and left:
        warnings.warn(left.describe(), stacklevel=2)
    return _grouped(found)[:limit] if group else found


def record_of(example: Example) -> dict[str, Any]:
    """A conversation as a record that reads as the same example again.

    Args:
        example: one with messages.
    """
    messages = list(example.messages or ())
    if example.learned_from:
        record = {"prompt": messages[: example.learned_from], "completion": messages[example.learned_from :]}
    else:
        record = {"messages": messages}
    more: dict[str, Any] = {"tools": example.tools and list(example.tools), "chat_template_kwargs": example.template}
    return {**record, **{name: value for name, value in more.items() if value}}


class _NoOutput(str):
    """Stands in for the output of a record that has none, so that its shape is one that data.examples knows."""


def _plain(rows: Iterator[Row], columns: Mapping[str, str], chat: bool) -> Iterator[Row]:
    free = not {*columns} - {"input", "instruction", "system", "tools"}
    given = {columns.get(name, name) for name in ("input", "instruction")}
    for place, record in rows:
        tokens, tags = record.get("tokens"), record.get("tags")
        if isinstance(tokens, list) and isinstance(tags, list) and not columns:
            others = {name: value for name, value in record.items() if name not in ("tokens", "tags")}
            record = {**others, "input": " ".join(map(str, tokens)), "output": " ".join(map(str, tags))}
        elif (
            free and given & set(record) and not any("text" not in c.columns for c in candidates(record, columns, chat))
        ):
            record = {**record, "output": _NoOutput("-")}
        yield place, record


def _grouped(tasks: Iterable[Task]) -> list[Task]:
    found: dict[str, Task] = {}
    for task in tasks:
        earlier = found.get(task.input)
        found[task.input] = (
            task if earlier is None else replace(earlier, references=earlier.references + task.references)
        )
    return list(found.values())


def read_predictions(path: Path) -> tuple[list[str], list[str] | None]:
    """The predictions in a file, and the keys of their examples where it has them.

    A ``.jsonl`` file has a record a line, with the text as ``prediction`` (or ``output``, or ``text``); any other file
    has a text a line, and an empty line is an empty text.

    Raises:
        DataError: the file is missing, empty, or a record has no prediction.
    """
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        records = list(read_rows(path))
        texts = [_prediction(place, record) for place, record in records]
        keys = [record.get("key") for _, record in records]
        return texts, [str(k) for k in keys] if all(keys) else None
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # not splitlines: texts hold U+2028
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: {exc}; expected UTF-8 text with a prediction a line, or a .jsonl file") from exc
    if not any(line.strip() for line in lines):
        raise DataError(f"{path} is empty: it holds no predictions")
    return lines, None


def _prediction(place: str, record: Mapping[str, Any]) -> str:
    for name in PREDICTION:
        if isinstance(value := record.get(name), str):
            return value
    raise DataError(f"{place}: no prediction; expected a text under one of {', '.join(PREDICTION)}")


def difference(mine: Sequence[str], theirs: Sequence[str]) -> str | None:
    """How two runs' examples (by key) differ, in words; None if they are the same in the same order."""
    if list(mine) == list(theirs):
        return None
    common = sum(1 for a, b in zip(mine, theirs, strict=False) if a == b)
    if len(mine) != len(theirs) and common == min(len(mine), len(theirs)):
        return f"one run has {len(mine)} examples and the other {len(theirs)}; the first {common} are the same"
    if sorted(mine) == sorted(theirs):
        return f"the same {len(mine)} examples in another order"
    first = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    shared = len(set(mine) & set(theirs))
    return (
        f"{len(mine)} and {len(theirs)} examples, of which {shared} are in both; the first that differs is example "
        f"{first}"
    )
