"""One process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foreword.errors import ConfigError


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock on a file, which is made if need be; it ends with the process, however that ends.

    Args:
        taken: what to say where another process holds it.

    Raises:
        ConfigError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: nothing is locked
        yield
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(taken) from None
        yield
