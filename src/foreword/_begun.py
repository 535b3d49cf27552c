"""Long work that goes on after a kill: a note of what was begun, and files that are whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError, DataError


def begin(note: Path, record: Mapping[str, Any], resume: bool, what: str) -> None:
    """Write down what is begun, or make sure that it is what was begun before.

    Args:
        record: what JSON can hold; anything that would change the results.
        what: for the messages, e.g. ``"questions"``.

    Raises:
        ConfigError: something was begun and ``resume`` isn't asked for, or it was begun with another record.
        DataError: the note is damaged.
    """
    if not note.exists():
        write_whole(note, json.dumps(record, indent=1) + "\n")
        return
    if not resume:
        raise ConfigError(f"{note.parent} holds {what} that were begun; pass --resume to go on, or another --out")
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        different = next((name for name in record if known.get(name) != record[name]), None)
    except (OSError, ValueError, AttributeError) as exc:
        raise DataError(f"{note} can't be read: {exc}; give another --out") from exc
    if different is not None:
        raise ConfigError(
            f"{note.parent} holds {what} that were begun with another {different} ({_short(known.get(different))} "
            f"there, {_short(record[different])} here); give what it was begun with, or another --out"
        )


def require(
    folder: Path, note: str, what: str, *, resume: bool, more: str = "pass --resume to go on with it", besides: str = ""
) -> bool:
    """Whether a folder holds something that was begun, to be gone on with; False: it may be begun there.

    Args:
        note: the file that says so.
        what: for the messages, with its article, e.g. ``"an evaluation"``.
        more: what to do where something is there and ``resume`` was not asked for.
        besides: a file that may be there before.

    Raises:
        ConfigError: it holds one and ``resume`` was not asked for, or none and it was; or it holds other things.
    """
    name = what.partition(" ")[2]
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give the name of a folder for the {name}")
    if not (folder / note).exists():
        if strange := sorted(p.name for p in folder.iterdir() if p.name != besides) if folder.is_dir() else []:
            raise ConfigError(f"{folder} holds {strange[0]}, which is not of {what}; give another --out")
        if resume:
            raise ConfigError(f"--resume: {folder} holds no {name}; leave --resume out to begin one")
        return False
    if not resume:
        raise ConfigError(f"{folder} holds {what} already; {more}, or give another --out")
    return True


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file under another name, then rename it: at no moment is half of it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
