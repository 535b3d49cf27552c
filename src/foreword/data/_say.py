"""In whose words a message names an option: Python's arguments, or the command line's options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Words = Literal["python", "cli", "yaml"]
_words: ContextVar[Words] = ContextVar("words", default="python")


@contextmanager
def speaking(words: Words) -> Iterator[None]:
    """Messages that arise inside name options in these words."""
    token = _words.set(words)
    try:
        yield
    finally:
        _words.reset(token)


def mapped(columns: Mapping[str, str], name: str = "columns") -> str:
    """How a mapping of columns is given: ``--column input=prompt`` or ``columns={'input': 'prompt'}``."""
    if _words.get() == "cli":
        option = {"columns": "--column", "where": "--where"}[name]
        return " ".join(f"{option} {_quoted(f'{ours}={theirs}')}" for ours, theirs in columns.items())
    if _words.get() == "yaml":
        return f"{name}: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in columns.items())}}}"
    return f"{name}={dict(columns)!r}"


def option(name: str, value: str | int) -> str:
    """How another option is given: ``--turns last`` or ``turns='last'``."""
    if _words.get() == "cli":
        flag = f"--{name.replace('_', '-')}"
        return flag if value is True else f"{flag} {value}"
    return f"{name}: {str(value).lower()}" if _words.get() == "yaml" else f"{name}={value!r}"


def argument(name: str) -> str:
    """An argument that maps columns, by its name: ``columns=`` or ``--column``."""
    return {"columns": "--column", "where": "--where"}[name] if _words.get() == "cli" else f"{name}="


def in_python(text: str) -> str:
    """A remark for those who call from Python; empty for others."""
    return text if _words.get() == "python" else ""


def in_general() -> str:
    """What Python's form looks like where a guess isn't enough; empty in other words, whose help says it."""
    return in_python(" In general: columns={'input': 'question', 'output': 'answer'}, or {'text': 'body'}.")


def listed(names: Sequence[str]) -> str:
    """Names in quotes with commas, or "none"."""
    return ", ".join(repr(name) for name in names) or "none"


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
