"""The errors that foreword raises on purpose.

Each message says what was wrong, what was expected and what to do next. Everything derives from
``ForewordError``, so ``except fw.ForewordError`` catches what foreword refuses and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

_MOST_NAMES = 20  # in a message; a library may hold a thousand


class ForewordError(Exception):
    """Base class of every error that foreword raises on purpose."""


class ConfigError(ForewordError, ValueError):
    """A configuration value is missing, malformed, or contradicts another one."""


class UnsupportedModelError(ForewordError):
    """The model does something that a prefix cannot be added to; the message names it."""


class AttachError(ForewordError):
    """A prefix cannot be attached (or detached) in the model's present state."""


class MismatchError(ForewordError):
    """A prefix and a model, or two prefixes, do not belong together."""


class PrefixFileError(ForewordError):
    """A prefix folder is missing, incomplete, corrupt, or of an unknown format."""


class DataError(ForewordError, ValueError):
    """Training data is unusable; the message gives the file and line."""


class DivergedError(ForewordError):
    """Training produced a non-finite loss or an exploding gradient and was stopped."""


class MissingPartError(ForewordError):
    """Something optional is not installed; the message gives the command that installs it."""


class StoreError(ForewordError):
    """An object store, a model hub, or what else prefixes are kept in, can't be read or written."""


class OverloadedError(ForewordError):
    """A serving engine's queue is full; ``retry_after`` says in how many seconds to try again."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BudgetError(ForewordError):
    """There is no room within a budget; ``needed`` bytes were, ``free`` of ``limit`` are.

    ``retry_after`` says in how many seconds there may be some, if that depends on requests that are running.
    """

    def __init__(
        self, message: str, *, needed: int = 0, free: int = 0, limit: int = 0, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.needed, self.free, self.limit, self.retry_after = needed, free, limit, retry_after


class DeadlineError(ForewordError):
    """A request was not answered within its time."""


class StoppedError(ForewordError):
    """A serving engine takes no requests any more, or stopped while one was running."""


class PrecisionWarning(UserWarning):
    """Something is trained in fewer bits than training needs; the message says what to load instead."""


class InexactWarning(UserWarning):
    """What was made stands for something only roughly; the message says why, and what would be exact."""


def nearest(name: str, names: Iterable[str], *, n: int = 3, cutoff: float = 0.6) -> str:
    """The end of a message about a name that is none of these: those that are like it, or what there is."""
    from difflib import get_close_matches

    known = list(names)
    near = get_close_matches(name, known, n=n, cutoff=cutoff)
    if near:
        return f"did you mean {' or '.join(near)}?"
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return f"there are: {', '.join(known[:_MOST_NAMES]) or 'none'}{more}"
