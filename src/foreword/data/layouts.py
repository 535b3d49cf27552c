"""Which columns of a record are the prompt, the answer and the conversation.

A layout is a mapping from our names to the record's columns. Several may fit a record: what is written in our own
names comes first, in a fixed order; among the layouts of other programs, two that fit are refused rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..errors import DataError
from ._say import argument, in_general, listed, mapped, option

# Our names, which --column and columns= map.
NAMES = ("input", "output", "references", "text", "messages", "instruction", "system", "tools")
_SHAPES = (("messages",), ("instruction", "output"), ("input", "output"), ("input", "references"), ("text",))
# Beside a shape, these are used where they are there and have a place.
_BESIDE = ("system", "tools")

_INPUTS = ("input", "prompt")
# A question ends where a prompt would have a line end or a blank; a chat template knows what comes between.
_QUESTIONS = (*_INPUTS, "question")
_ANSWERS = ("output", "completion", "response", "answer")
_CONVERSATIONS = ("conversations", "conversation")
_ALIASES = {"system": ("system", "system_prompt"), "tools": ("tools",), "instruction": ("instruction",)}
# For advice only: columns of other names that probably mean the same, in order of likelihood.
_LIKE_INPUT = (*_QUESTIONS, "instruction", "query", "source", "src", "article", "document", "context", "premise")
_LIKE_OUTPUT = (*_ANSWERS, "target", "tgt", "chosen", "summary", "label", "reply", "assistant")
_LIKE_TEXT = ("text", "content", "body", "sentence", "document", "review")
_LIKE_MESSAGES = ("messages", *_CONVERSATIONS, "chat", "dialog", "dialogue", "chosen", "turns", "history")


@dataclass(frozen=True)
class Layout:
    """Our names with the columns that they are in; ``own`` where these are our own names or were mapped."""

    columns: Mapping[str, str]
    own: bool

    def value(self, record: Mapping[str, Any], name: str) -> Any:
        """The record's value under one of our names; None where the layout has no such column."""
        return record.get(self.columns[name]) if name in self.columns else None


def check(columns: Mapping[str, str]) -> None:
    """Refuse a mapping of columns that no record can have.

    Raises:
        DataError: A name is unknown, or no shape has all the names.
    """
    unknown = sorted(set(columns) - set(NAMES))
    if unknown:
        raise DataError(
            f"{argument('columns')} maps the unknown name {unknown[0]!r}. The names are {', '.join(sorted(NAMES))}; "
            f"write {mapped({'input': 'question', 'output': 'answer'})} ({{our name: the file's column}})."
        )
    main = set(columns) - set(_BESIDE)
    if not any(main <= {*shape, *(("input",) if "instruction" in shape else ())} for shape in _SHAPES):
        raise DataError(
            f"{argument('columns')} maps {listed(list(columns))}, which no record shape has together. Expected "
            f"{'; or '.join(' and '.join(map(repr, shape)) for shape in _SHAPES)}."
        )


def layout_of(place: str, record: Mapping[str, Any], columns: Mapping[str, str], chat: bool = False) -> Layout:
    """The layout of a record.

    Args:
        chat: conversations are made of inputs and outputs, so that questions and answers are some as well.

    Raises:
        DataError: None fits, or several do.
    """
    found = list(candidates(record, columns, chat))
    if not found:
        raise DataError(_missing(place, record, columns))
    # Tables fill absent values with null, so a layout without nulls is the one that was meant.
    full = [f for f in found if _is_full(record, f)]
    chosen = full or found
    if chosen[0].own or len(chosen) == 1:
        return chosen[0]
    ways = " or ".join(mapped({n: c for n, c in layout.columns.items() if n not in _BESIDE}) for layout in chosen)
    raise DataError(f"{place}: the columns {listed(list(record))} can be read in several ways. Say which: {ways}.")


def _is_full(record: Mapping[str, Any], layout: Layout) -> bool:
    optional = {*_BESIDE, *(("input",) if "instruction" in layout.columns else ())}
    return all(record[column] is not None for name, column in layout.columns.items() if name not in optional)


def candidates(record: Mapping[str, Any], columns: Mapping[str, str], chat: bool = False) -> Iterator[Layout]:
    """The layouts that fit a record, in order of preference; null values count as there."""
    beside, inputs = dict(_beside(record, columns)), _QUESTIONS if chat else _INPUTS

    def there(name: str, *others: str) -> list[str]:
        return [c for c in ([columns[name]] if name in columns else (name, *others)) if c in record]

    def layout(own: bool, **found: str) -> Iterator[Layout]:
        if {*columns} - set(_BESIDE) <= set(found):
            yield Layout({**found, **beside}, own)

    for column in there("messages"):
        yield from layout(True, messages=column)
    if "instruction" in columns or "input" not in columns:
        yield from _instructions(record, there, layout)
    for kind in ("output", "references"):
        for prompt, answer in product(there("input"), there(kind)):
            yield from layout(True, **{"input": prompt, kind: answer})
    # What other programs call them; with our own names mapped, only what is left is looked for.
    for column in (c for c in _CONVERSATIONS if c in record and "messages" not in columns):
        yield from layout(False, messages=column)
    for prompt, answer in product(there("input", *inputs[1:]), there("output", *_ANSWERS[1:])):
        if (prompt, answer) != (columns.get("input", "input"), columns.get("output", "output")):
            yield from layout(False, input=prompt, output=answer)
    for column in there("text"):
        yield from layout("text" in columns, text=column)


def _instructions(record: Mapping[str, Any], there: Any, layout: Any) -> Iterator[Layout]:
    """Alpaca's ``instruction``, ``input``, ``output``, and Dolly's ``instruction``, ``context``, ``response``."""
    for column in there("instruction"):
        answers = [c for c in there("output", *_ANSWERS[1:]) if record[c] is not None] or there("output")
        own = len(answers) == 1 and record[column] is not None
        inputs = there("input") or [c for c in ("context",) if c in record]
        for answer in answers:
            yield from layout(own, instruction=column, output=answer, **({"input": inputs[0]} if inputs else {}))


def _beside(record: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in _BESIDE:
        names = [columns[name]] if name in columns else _ALIASES[name]
        if found := next((c for c in names if c in record), None):
            yield name, found


# --- advice -----------------------------------------------------------------------------------------------


def _missing(place: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    main = set(columns) - set(_BESIDE)
    shapes = [shape for shape in _SHAPES if main <= set(shape)] or list(_SHAPES)
    expected = "; or ".join(" and ".join(repr(columns.get(name, name)) for name in shape) for shape in shapes)
    given = f" The mapping is {mapped(columns)}." if columns else ""
    return (
        f"{place}: columns are missing. Found: {listed(list(record))}. Expected {expected}.{given} "
        f"{_advice(record)}{in_general()}"
    )


def _advice(record: Mapping[str, Any]) -> str:
    if len(record) == 1 and (sign := re.search(r"[;\t|]", next(iter(record)))):
        name = {";": "a semicolon", "\t": "a tab", "|": "a bar"}[sign[0]]
        return f"The file looks separated by {name}; a .csv is by commas, a .tsv by tabs."
    found = suggestion(record)
    asked = found.get("input") == "question" and "output" in found
    other = f", or {option('chat', True)} to put both into the model's chat template" if asked else ""
    return f"Say which column is which: {mapped(found)}{other}."


def suggestion(record: Mapping[str, Any]) -> dict[str, str]:
    """What a record's columns probably are, as a mapping for ``columns=``."""
    lists = [c for c, value in record.items() if isinstance(value, list | tuple)]
    if conversation := _first_like(_LIKE_MESSAGES, lists):
        return {"messages": conversation}
    texts = [c for c, value in record.items() if isinstance(value, str)] or list(record)
    output = _first_like(_LIKE_OUTPUT, texts)
    prompt = _first_like(_LIKE_INPUT, [c for c in texts if c != output])
    if not (prompt and output) and (text := _first_like(_LIKE_TEXT, texts)) and not prompt and not output:
        return {"text": text}
    left = iter([c for c in texts if c not in (prompt, output)])
    found = {"input": prompt or next(left, None), "output": output or next(left, None)}
    named = {name: column for name, column in found.items() if column is not None}
    return named if len(named) == 2 or not texts else {"text": texts[0]}


def _first_like(likely: Sequence[str], columns: Sequence[str]) -> str | None:
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in likely if name in lower), None)
