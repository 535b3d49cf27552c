"""What several commands need."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import typer

from foreword.errors import ConfigError


def quiet() -> None:
    """Leave the screen to us: transformers' notes and bars are for programmers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate)\b.*")


def print_json(record: Any) -> None:
    """One JSON value on stdout."""
    typer.echo(json.dumps(record, ensure_ascii=False, indent=1))


def pairs(options: Sequence[str], name: str) -> dict[str, str]:
    """``["a=b", …]`` as a dict.

    Raises:
        ConfigError: an option without ``=``.
    """
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ConfigError(f"{name} {option!r} is not of the form KEY=VALUE")
        found[key] = value
    return found
