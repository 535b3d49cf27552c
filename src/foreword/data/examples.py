"""Reading training examples: any supported source becomes a list of ``Example``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .rows import Row, read_rows

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]

# The record shapes, in order of preference.
_SHAPES = (("messages",), ("input", "output"), ("input", "references"), ("text",))
_NAMES = frozenset(name for shape in _SHAPES for name in shape)
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn: after ``input``, write ``output``.

    Attributes:
        input: The prompt. Empty when the example is plain text.
        output: The text that the loss is computed on.
        source: Where it was read, "file:line" or "dataset[index]". Error messages quote it.
        messages: The whole conversation, when the record was one. It goes through the tokenizer's chat
            template; ``input`` then holds the earlier contents, one per line, for people to read.
    """

    input: str
    output: str
    source: str
    messages: tuple[dict[str, Any], ...] | None = None


def read_examples(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    where: Mapping[str, str] | None = None,
) -> list[Example]:
    """Read training examples.

    A record may have one of four shapes: ``messages`` (a list of ``{role, content}`` that ends with the
    assistant), ``input`` and ``output``, ``input`` and ``references`` (a list; one example each), or
    ``text``. When a record fits several, the first in this order counts.

    Args:
        source: A .jsonl, .ndjson, .json (one list), .csv, .tsv or .parquet file; a folder written by
            ``datasets.save_to_disk``; a dataset's name ("name" or "name:config"); a ``datasets`` object; or a
            list of dicts.
        columns: Maps our names (input, output, references, text, messages) to the source's column names.
            Only shapes that use all the mapped names are then considered.
        split: Which split of a dataset to take. May be left out when it has only one.
        limit: Stop after this many examples. What comes later is then not read, and so not checked.
        where: Keep only the records whose column, written as a string, equals the value. JSON's true, false
            and null are written that way.

    Raises:
        DataError: If anything about the source or a record is wrong. The message gives the file and line.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"limit must be a whole number of at least 1, or None for all; it is {limit!r}.")
    examples: list[Example] = []
    for _, found in by_record(read_rows(source, split), columns=columns, where=where):
        for example in found:
            examples.append(example)
            if len(examples) == limit:
                return examples
    return examples


def by_record(
    rows: Iterator[Row], *, columns: Mapping[str, str] | None = None, where: Mapping[str, str] | None = None
) -> Iterator[tuple[Mapping[str, Any], Iterator[Example]]]:
    """Each record of :func:`~foreword.data.rows.read_rows` with its examples; arguments as for ``read_examples``."""
    columns = dict(columns or {})
    shapes = _shapes_for(columns)
    for place, record in _matching(rows, where) if where else rows:
        yield record, _examples_of(place, record, columns, shapes)


def _shapes_for(columns: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return the shapes that use every mapped name."""
    unknown = sorted(set(columns) - _NAMES)
    if unknown:
        raise DataError(
            f"columns= maps the unknown name {unknown[0]!r}. The names are {', '.join(sorted(_NAMES))}; "
            "write columns={our name: the file's column}."
        )
    shapes: list[tuple[str, ...]] = [shape for shape in _SHAPES if set(columns) <= set(shape)]
    if not shapes:
        raise DataError(f"columns= maps {_listed(columns)}, which no record shape has together. {_EXPECTED}")
    return shapes


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


_EXPECTED = f"Expected {'; or '.join(' and '.join(map(repr, shape)) for shape in _SHAPES)}."


# --- choosing rows ----------------------------------------------------------------------------------------


def _matching(
    rows: Iterator[tuple[str, Mapping[str, Any]]], where: Mapping[str, str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    wanted = {column: _as_string(value) for column, value in where.items()}
    seen: dict[str, dict[str, None]] = {column: {} for column in wanted}
    kept = False
    place = ""
    for place, record in rows:
        if _matches(place, record, wanted, seen):
            kept = True
            yield place, record
    if not kept:
        found = "; ".join(f"{column!r} holds {_listed(list(values)[:8])}" for column, values in seen.items())
        raise DataError(f"{place}: where={dict(where)!r} leaves nothing, up to this last record. {found}.")


def _matches(
    place: str, record: Mapping[str, Any], wanted: Mapping[str, str], seen: dict[str, dict[str, None]]
) -> bool:
    """Compare one record, and note the values seen in case nothing ever matches."""
    matches = True
    for column, value in wanted.items():
        if column not in record:
            raise DataError(f"{place}: where= names the column {column!r}. Columns found: {_listed(record)}.")
        found = _as_string(record[column])
        if len(seen[column]) < 8:
            seen[column][found[:60]] = None
        matches = matches and found == value
    return matches


def _as_string(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


# --- from a record to examples ----------------------------------------------------------------------------


def _examples_of(
    place: str, record: Mapping[str, Any], columns: Mapping[str, str], shapes: list[tuple[str, ...]]
) -> Iterator[Example]:
    shape = _shape_of(place, record, columns, shapes)
    values = {name: record[columns.get(name, name)] for name in shape}
    if "messages" in values:
        yield _conversation(place, values["messages"])
        return
    if "text" in values:
        yield Example("", _text(place, "text", values["text"], blank=False), place)
        return
    prompt = _text(place, "input", values["input"], blank=True)
    if "output" in values:
        yield Example(prompt, _text(place, "output", values["output"], blank=False), place)
        return
    references = values["references"]
    if not isinstance(references, list | tuple) or not references:
        raise DataError(f"{place}: 'references' must be a list with at least one string, not {_shown(references)}.")
    for index, reference in enumerate(references):
        yield Example(prompt, _text(place, f"references[{index}]", reference, blank=False), place)


def _shape_of(
    place: str, record: Mapping[str, Any], columns: Mapping[str, str], shapes: list[tuple[str, ...]]
) -> tuple[str, ...]:
    present = [shape for shape in shapes if all(columns.get(name, name) in record for name in shape)]
    if not present:
        mapped = f" columns= maps {dict(columns)!r}." if columns else ""
        expected = "; or ".join(" and ".join(repr(columns.get(name, name)) for name in shape) for shape in shapes)
        raise DataError(
            f"{place}: columns are missing. Found: {_listed(record)}. Expected {expected}.{mapped} Say which "
            "column is which with columns={'input': 'question', 'output': 'answer'}, or {'text': 'body'}."
        )
    # Tables fill absent values with null, so a shape without nulls is the one that was meant.
    full = (s for s in present if all(record[columns.get(name, name)] is not None for name in s))
    return next(full, present[0])


def _text(place: str, name: str, value: object, *, blank: bool) -> str:
    """Return ``value`` if it is text that can be trained on."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r} must be a string, not {_shown(value)}.")
    if not blank and not value.strip():
        raise DataError(f"{place}: {name!r} is blank, so there is nothing to learn from it. Remove the record.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {name!r} holds half of a surrogate pair at character {error.start}; not valid text."
        ) from error
    return value


def _conversation(place: str, value: object) -> Example:
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{place}: 'messages' must be a list of {{role, content}}, not {_shown(value)}.")
    messages = tuple(_message(place, index, message) for index, message in enumerate(value))
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{place}: the last of the messages must be the assistant's, because that is what is learned; it "
            f"is the {messages[-1]['role']}'s."
        )
    if len(messages) < 2:
        raise DataError(f"{place}: 'messages' holds only the answer; at least one message must come before it.")
    last = len(messages) - 1
    output = _text(place, f"messages[{last}].content", messages[-1].get("content"), blank=False)
    return Example("\n".join(m.get("content") or "" for m in messages[:-1]), output, place, messages)


def _message(place: str, index: int, message: object) -> dict[str, Any]:
    name = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise DataError(f"{place}: {name!r} must be an object with 'role' and 'content', not {_shown(message)}.")
    # Tables fill the keys that a message lacks with null, and a chat template would take them as present.
    kept = {str(key): value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{place}: {name}.role is {role!r}. The roles are {', '.join(sorted(_ROLES))}.")
    # An assistant that only calls a tool says nothing.
    if "content" in kept or not (role == "assistant" and "tool_calls" in kept):
        _text(place, f"{name}.content", kept.get("content"), blank=True)
    return kept


def _shown(value: object) -> str:
    """Describe a wrong value in a few words."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
