"""Who sees the prefix: every position of the text, those after the input (infix), the first ones, or a window.

A query that does not see the prefix has ``l2 = -inf`` in the merge of ``foreword.attention``, which is the base
model's attention for that query. Infix-tuning ([x; INFIX; y]) is from Li & Liang 2021, section 7.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from foreword.errors import ConfigError

Predicate = Callable[[Tensor], Tensor]

_FORMS = '"all", "infix", "infix:2" (the last 2 tokens of the input see it as well), "first:16", "window:4:32"'


@dataclass(frozen=True, slots=True)
class Visibility:
    """A rule over positions.

    Attributes:
        kind: ``all``; ``infix``: from ``first`` tokens before the boundary between input and output on;
            ``window``: positions ``first <= p < stop``; ``predicate``: what a function of positions says.
    """

    kind: Literal["all", "infix", "window", "predicate"] = "all"
    first: int = 0
    stop: int = 0
    predicate: Predicate | None = None

    def to_json(self) -> str:
        """The form that :func:`parse` reads.

        Raises:
            ConfigError: a function, which a file can't hold.
        """
        if self.kind == "predicate":
            raise ConfigError(f"visible is a function, which can't be saved; use one of {_FORMS}")
        if self.kind == "infix":
            return f"infix:{self.first}" if self.first else "infix"
        return f"window:{self.first}:{self.stop}" if self.kind == "window" else "all"

    def sees(self, positions: Tensor, index: Tensor, boundary: Tensor | int | None) -> Tensor:
        """Which queries see the prefix, bool, broadcast to ``(B|1, S)``.

        Args:
            positions: ``(B|1, S)`` of each query, counted over real tokens.
            index: ``(B|1, S)``: the same, counted over all tokens, padding too.
            boundary: ``(B, 1)`` or a number: index of the first token of the output. For ``infix`` only.
        """
        if self.kind == "infix":
            assert boundary is not None
            return index >= boundary - self.first
        if self.kind == "window":
            return (positions >= self.first) & (positions < self.stop)
        if self.kind == "predicate":
            assert self.predicate is not None
            seen = self.predicate(positions)
            if not isinstance(seen, Tensor) or seen.shape != positions.shape or seen.dtype != positions.bool().dtype:
                got = f"{tuple(seen.shape)} {seen.dtype}" if isinstance(seen, Tensor) else type(seen).__name__
                raise ConfigError(
                    f"visible is a function that gave {got} for positions of shape {tuple(positions.shape)}; expected "
                    "a bool tensor of the same shape, e.g. lambda positions: positions % 2 == 0"
                )
            return seen
        return positions >= 0


def parse(visible: str | Predicate) -> Visibility:
    """A rule from a configuration's ``visible``.

    Raises:
        ConfigError: none of the forms.
    """
    if callable(visible):
        return Visibility("predicate", predicate=visible)
    if visible == "all":
        return Visibility()
    if match := re.fullmatch(r"infix(?::(\d+))?", visible):
        return Visibility("infix", int(match[1] or 0))
    if match := re.fullmatch(r"first:(\d+)", visible):
        start, stop = 0, int(match[1])
    elif match := re.fullmatch(r"window:(\d+):(\d+)", visible):
        start, stop = int(match[1]), int(match[2])
    else:
        raise ConfigError(f"visible={visible!r}; expected {_FORMS}, or a function of positions")
    if start >= stop:
        raise ConfigError(f"visible={visible!r} leaves no position that sees the prefix; expected first < stop")
    return Visibility("window", start, stop)
