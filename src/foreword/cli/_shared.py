"""What several commands need."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from foreword.errors import ConfigError, MissingPartError

if TYPE_CHECKING:
    from foreword.prefix import Prefix


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
        ConfigError: an option without ``=``, or two of one key.
    """
    found: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key in found:
            raise ConfigError(f"{name} names {key!r} twice; expected different names")
        if not equals or not key:
            raise ConfigError(f"{name} {option!r} is not of the form KEY=VALUE")
        found[key] = value
    return found


def load_base(prefix: Prefix, model: str | None, *, dtype: str | None, **options: Any) -> Any:
    """The base model and its tokenizer: the one named, or the one that the prefix remembers.

    Args:
        options: more of ``load_model``'s.

    Raises:
        ConfigError: the prefix remembers none, or it can't be loaded.
    """
    from foreword.models import DEMO, load_model, packaged_model

    if model is not None:
        return load_model(model, dtype=dtype, **options)
    name = prefix.fingerprint.base_model
    if not name:
        raise ConfigError("the prefix doesn't say by what name its base model was loaded; give --model")
    try:
        packaged = packaged_model().stem
    except MissingPartError:
        packaged = None
    try:
        return load_model(DEMO if name == packaged else name, dtype=dtype, **options)
    except ConfigError as exc:
        raise ConfigError(
            f"the prefix names {name!r} as its base model, which can't be loaded; give --model ({exc})"
        ) from exc
