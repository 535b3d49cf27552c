"""Questions about a text as they are kept, asked and learned from; passages of it; parts that are read at a time.

A row is a dict of ``question``, ``answer`` and ``kind``: what ``self_study`` writes down, and what a user may give.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from foreword.data import Example, read_examples
from foreword.data.examples import Unused, by_record
from foreword.data.rows import read_rows
from foreword.errors import ConfigError, DataError

Row = dict[str, Any]

_CONTINUE = ("Continue this passage of the text: “{}”", "What comes after “{}” in the text?", "Complete: “{}”")


def passages(text: str, count: int, *, words: tuple[int, int] = (12, 36), seed: int = 0) -> list[Row]:
    """Pieces of a text to be continued, spread evenly over it: rows as of ``self_study``, without the model.

    Args:
        words: how many words are shown, and how many are the answer. White space is made single blanks.

    Raises:
        ConfigError: the text has too few words for one.
    """
    found = text.split()
    shown, continued = words
    last = len(found) - shown - 1
    if count and last < 0:
        raise ConfigError(f"a passage takes {shown + 1} words at least, and the text has {len(found)}; leave them out")
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        start = min(last, int((i + draw.random()) * (last + 1) / count))
        middle = start + shown
        question = _CONTINUE[i % len(_CONTINUE)].format(" ".join(found[start:middle]))
        rows.append({"question": question, "answer": " ".join(found[middle : middle + continued]), "kind": "passage"})
    return rows


def read_questions(path: str | Path) -> tuple[list[Example], list[Row]]:
    """A user's own file: whole examples in any form that training reads, or ``question`` with or without ``answer``.

    Returns:
        The examples, and the questions: one of the two is empty.

    Raises:
        DataError: the file can't be read, is empty, or a record has no question.
    """
    records = list(read_rows(str(path), None))
    if records and "question" not in records[0][1]:
        unused = Unused()
        found = [e for _, each in by_record(iter(records), unused=unused) for e in each]
        if unused:
            warnings.warn(unused.describe(), stacklevel=2)
        return found, []
    rows = []
    for place, record in records:
        values = {name: record.get(name) for name in ("question", "answer")}
        for name, value in values.items():
            if (value is None and name == "question") or not (
                value is None or (isinstance(value, str) and value.strip())
            ):
                raise DataError(f"{place}: {name!r} is {value!r}; expected a text (an answer may be left out)")
        rows.append({k: v for k, v in values.items() if v is not None} | {"kind": str(record.get("kind") or "given")})
    return [], rows


def examples_of(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
) -> list[Example]:
    """Questions and answers as training examples, in the form of :func:`asked`."""
    if not chat:
        pairs = ((asked(tokenizer, r["question"]), f" {r['answer']}") for r in rows)
        return read_examples([{"input": question, "output": answer} for question, answer in pairs])
    roles = ("user", "question"), ("assistant", "answer")
    return read_examples([{"messages": [{"role": who, "content": r[what]} for who, what in roles]} for r in rows])


# ---------------------------------------------------------------- asking


def context(text: str) -> str:
    """A text as it stands before a question: with a blank line between them."""
    return text.rstrip() + "\n\n"


def asked(tokenizer: PreTrainedTokenizerBase, question: str, chat: bool = False) -> str:
    """A question as the model is asked it, up to where its answer begins.

    Raises:
        ConfigError: ``chat`` without a chat template.
    """
    if not chat:
        return f"Question: {question}\nAnswer:"
    if tokenizer.chat_template is None:
        raise ConfigError("this model's tokenizer has no chat template; ask without (chat=False)")
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def wished(tokenizer: PreTrainedTokenizerBase, heading: str, chat: bool) -> str:
    """The wish for a question under a heading, up to where the question begins."""
    one = f"Write one question or request that could stand under this heading, and nothing else: {heading}."
    return asked(tokenizer, one, chat) if chat else f"{heading}:\n\nQuestion: "


# ---------------------------------------------------------------- parts


def chunks(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> list[str]:
    """Paragraphs put together to parts of at most ``size`` tokens; one that is longer is halved until it fits."""
    found: list[str] = []
    room = 0
    for piece in (p for paragraph in re.split(r"\n\s*\n", text) for p in _halved(tokenizer, paragraph, size)):
        needed = _tokens(tokenizer, piece)
        if found and needed < room:
            found[-1] += "\n\n" + piece
            room -= needed + 1
        elif piece.strip():
            found.append(piece)
            room = size - needed
    return found


def _halved(tokenizer: PreTrainedTokenizerBase, paragraph: str, size: int) -> list[str]:
    words = paragraph.split(" ")
    if len(words) < 2 or _tokens(tokenizer, paragraph) <= size:
        return [paragraph]
    middle = len(words) // 2
    return [p for half in (words[:middle], words[middle:]) for p in _halved(tokenizer, " ".join(half), size)]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
