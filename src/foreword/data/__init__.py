"""Training data: read it, encode it, batch it, look at it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .encode import encode
from .examples import Example, read_examples

if TYPE_CHECKING:
    from .collate import Collator
    from .encoded import EncodedDataset, EncodeStats
    from .mixture import TaskMixture
    from .show import batch_text, show_batch

__all__ = [
    "Collator",
    "EncodeStats",
    "EncodedDataset",
    "Example",
    "TaskMixture",
    "batch_text",
    "encode",
    "read_examples",
    "show_batch",
]

# These need torch or rich, which take a while to import and are not needed to read examples.
_LATER = {
    "Collator": "collate",
    "EncodeStats": "encoded",
    "EncodedDataset": "encoded",
    "TaskMixture": "mixture",
    "batch_text": "show",
    "show_batch": "show",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value
