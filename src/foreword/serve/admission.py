"""Who is next: what an engine takes on, and which of the waiting requests begin together.

Memory is promised before a request begins: a row may come to hold its prompt and its answer to the last token, and what
all rows may come to hold stays within ``Limits.columns``. So a request that was begun is never sent away again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foreword.errors import ConfigError
from foreword.serve.request import Request

_FEW = 64  # tokens of padding that cost nothing to speak of


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine takes on.

    Attributes:
        rows: answers that are written at once.
        queue: requests that may wait.
        length: tokens of a prompt and its answer together; None: what the model was made for.
        columns: tokens that the rows at work may come to have together (prompts, and answers to their last token),
            which bounds the memory of keys and values; None: as many as ``rows`` of full length.
        step_tokens: prompt tokens that are read in one step, between two tokens of the rows that are being written.

    Raises:
        ConfigError: one is less than 1.
    """

    rows: int = 16
    queue: int = 64
    length: int | None = None
    columns: int | None = None
    step_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "length", "columns", "step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; expected 1 or more")


def next_group(waiting: Sequence[Request], rows: int, columns: int, step_tokens: int) -> list[Request]:
    """The requests whose prompts are read next: whoever waits longest, and others that are about as long.

    Whoever is passed over because his prompt is longer or shorter keeps his room: he is first the next time.

    Args:
        rows: that are free.
        columns: that are free.
        step_tokens: prompt tokens, padding included, that are read together.
    """
    group: list[Request] = []
    for request in waiting:
        if request.sampling.n > rows or request.columns > columns:
            break
        rows, columns = rows - request.sampling.n, columns - request.columns
        if not group or _together([*group, request], step_tokens):
            group.append(request)
    return group


def _together(requests: Sequence[Request], most: int) -> bool:
    """Whether prompts may be read as one batch: at most a quarter of it, or a few tokens, is padding."""
    lengths = [len(r.prompt) for r in requests]
    whole = len(lengths) * max(lengths)
    recalls = {r.recall for r in requests} - {None}
    return whole <= most and whole - sum(lengths) <= max(whole // 4, _FEW) and len(recalls) <= 1
