"""How much may be spent: a number of something (trials, steps), or seconds. Exactly one of them."""

from __future__ import annotations

import re

from foreword.errors import ConfigError

_SECONDS = {"s": 1, "m": 60, "h": 3600}


def check(number: int | None, seconds: float | None, what: str) -> None:
    """Raise ConfigError where neither or both are given, or one is not above 0.

    Args:
        what: is counted, e.g. ``"steps"``.
    """
    if (number is None) == (seconds is None):
        raise ConfigError(f"a budget is a number of {what} or of seconds; give one of them")
    if number is not None and number < 1:
        raise ConfigError(f"a budget of {number} {what}; expected 1 or more")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ConfigError(f"a budget of {seconds:g} seconds; expected a number above 0")


def parse(text: str, what: str, example: int) -> tuple[int | None, float | None]:
    """``"20"``, ``"20 steps"``: a number; ``"300s"``, ``"10m"``, ``"2h"``: seconds.

    Raises:
        ConfigError: it is neither.
    """
    if found := re.fullmatch(rf"\s*(-?\d+)\s*({what}|{what[:-1]})?\s*", text):
        return int(found[1]), None
    if (seconds := parse_seconds(text)) is not None:
        return None, seconds
    raise ConfigError(f"the budget {text!r} is neither a number of {what} ({example}) nor a time (300s, 10m, 2h)")


def parse_seconds(text: str) -> float | None:
    """``"300s"``, ``"10m"``, ``"2h"`` in seconds; None: it is no time."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    return float(found[1]) * _SECONDS[found[2]] if found else None
