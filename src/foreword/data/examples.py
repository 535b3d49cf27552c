"""Reading training examples: any supported source becomes a list of ``Example``."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import DataError
from . import layouts, shapes
from ._example import Conversation, Example
from ._say import listed, mapped, option
from .rows import Row, read_rows

__all__ = ["Conversation", "Example", "Examples", "by_record", "collect", "read_examples"]

Source = (
    str
    | os.PathLike[str]
    | Iterable[str | os.PathLike[str]]
    | Iterable[Mapping[str, Any]]
    | Mapping[str, Iterable[Mapping[str, Any]]]
)


class Examples(list[Example]):
    """The examples that were read, and what was not.

    Attributes:
        unused: The columns that no example was made of, each with the number of records that have a value there.
    """

    def __init__(self, found: Iterable[Example] = (), unused: Mapping[str, int] | None = None) -> None:
        super().__init__(found)
        self.unused: dict[str, int] = dict(unused or {})
        self._described = unused.describe() if isinstance(unused, Unused) else ""

    def describe_unused(self) -> str:
        """One line that names the columns not used, and how to use them; empty where all were."""
        return self._described


class Unused(Counter[str]):
    """The columns that hold something and that no example is made of, with how many records have them."""

    def __init__(self) -> None:
        super().__init__()
        self._texts: dict[str, None] = {}
        self._pairs = False

    def note(self, record: Mapping[str, Any], layout: layouts.Layout, used: set[str]) -> None:
        """Count a record's."""
        self._pairs = self._pairs or "messages" not in layout.columns
        for column, value in record.items():
            if column not in used and not _is_empty(value):
                self[column] += 1
                if isinstance(value, str) and "messages" not in layout.columns:
                    self._texts[column] = None

    def describe(self) -> str:
        """One line that names them, and how to use them; empty where there are none."""
        return f"columns not used: {', '.join(self)}{self._advice()}" if self else ""

    def _advice(self) -> str:
        found = []
        known = {"instruction", "system", "system_prompt", "tools", "history", "label", "weight", "score"}
        if "instruction" in self:
            found.append(f"{mapped({'instruction': 'instruction'})} puts the instruction into the prompt")
        if self._pairs and (beside := [c for c in ("system", "system_prompt", "tools", "history") if c in self]):
            found.append(f"{option('chat', True)} makes conversations, with {' and '.join(beside)}")
        if column := next((c for c in ("label", "weight", "score") if c in self), None):
            found.append(f"{mapped({column: 'VALUE'}, 'where')} keeps rows by it")
        if column := next((c for c in self._texts if c not in known), None):
            found.append(f"to use one: {mapped({'input': column})} or {mapped({'output': column})}")
        return f" ({'; '.join(found)})" if found else ""


def read_examples(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    where: Mapping[str, str] | None = None,
    chat: bool = False,
) -> Examples:
    """Read training examples.

    A record may be a conversation (``messages``, or ``conversations``), an ``instruction`` with an ``output`` and
    perhaps an ``input`` (Alpaca), an ``input`` with an ``output`` or ``references`` (a list; one example each), a
    ``prompt`` with a ``completion``, ``response`` or ``answer`` (texts, or lists of messages), or ``text``. When a
    record fits several of those that are written in our own names (messages; instruction; input and output; input and
    references), the first in this order counts; between others it must be said which is meant.
    Columns that are not used are named in a warning, and kept as ``unused``.

    Args:
        source: A .jsonl, .ndjson, .json (one list), .csv, .tsv or .parquet file, the text ones also as .gz; "-", lines
            of JSON from standard input; a pattern of files; a folder written by ``datasets.save_to_disk``; a dataset's
            name ("name" or "name:config"); several of these, which are joined; a ``datasets`` object; or a list of
            dicts.
        columns: Maps our names (input, output, references, text, messages, instruction, system, tools) to the
            source's column names. Only layouts that use all the mapped names are then considered.
        split: Which split of a dataset to take. May be left out when it has only one.
        limit: Stop after this many examples. What comes later is then not read, and so not checked.
        where: Keep only the records whose column, written as a string, equals the value. JSON's true, false
            and null are written that way.
        chat: Make conversations of inputs and outputs, and of instructions: the model's chat template then writes
            the prompt, with the record's ``system`` in it.

    Raises:
        DataError: If anything about the source or a record is wrong. The message gives the file and line.
    """
    found = collect(source, columns=columns, split=split, limit=limit, where=where, chat=chat)
    if found.unused:
        warnings.warn(found.describe_unused(), stacklevel=2)
    return found


def collect(
    source: object,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    where: Mapping[str, str] | None = None,
    chat: bool = False,
) -> Examples:
    """The same without a warning, for callers that say themselves what was not used.

    Raises:
        DataError: As :func:`read_examples`.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"limit must be a whole number of at least 1, or None for all; it is {limit!r}.")
    examples: list[Example] = []
    unused = Unused()
    for _, found in by_record(read_rows(source, split), columns=columns, where=where, chat=chat, unused=unused):
        for example in found:
            examples.append(example)
            if len(examples) == limit:
                break
        if len(examples) == limit:
            break
    return Examples(examples, unused)


def by_record(
    rows: Iterator[Row],
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    chat: bool = False,
    unused: Unused | None = None,
) -> Iterator[tuple[Mapping[str, Any], Iterator[Example]]]:
    """Each record of :func:`~foreword.data.rows.read_rows` with its examples; arguments as for ``read_examples``.

    Args:
        unused: Counts, as records are read, the columns that hold something and are not used.
    """
    columns = dict(columns or {})
    layouts.check(columns)
    known: dict[Any, layouts.Layout] = {}  # records of one source have few forms
    used: dict[Any, set[str]] = {}
    for place, record in _matching(rows, where) if where else rows:
        form = (*record, *(value is None for value in record.values()))
        layout = known.get(form)
        if layout is None:
            layout = known[form] = layouts.layout_of(place, record, columns, chat)
        if unused is not None:
            kind = (form, shapes.is_chat(layout, record))
            if kind not in used:
                used[kind] = shapes.used(layout, record, chat) | set(where or ())
            unused.note(record, layout, used[kind])
        yield record, shapes.examples(place, record, layout, columns, chat)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


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
        found = "; ".join(f"{column!r} holds {listed(list(values)[:8])}" for column, values in seen.items())
        raise DataError(f"{place}: {mapped(where, 'where')} leaves nothing, up to this last record. {found}.")


def _matches(
    place: str, record: Mapping[str, Any], wanted: Mapping[str, str], seen: dict[str, dict[str, None]]
) -> bool:
    """Compare one record, and note the values seen in case nothing ever matches."""
    matches = True
    for column, value in wanted.items():
        if column not in record:
            raise DataError(
                f"{place}: {mapped({column: value}, 'where')} names the column {column!r}. Columns found: "
                f"{listed(list(record))}."
            )
        found = _as_string(record[column])
        if len(seen[column]) < 8:
            seen[column][found[:60]] = None
        matches = matches and found == value
    return matches


def _as_string(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)
