"""Bytes of a tier: what may be taken, and what is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Account:
    """Of a tier.

    Attributes:
        limit: None: there is none.
        used: never more than the limit.
        most: that were ever used.
    """

    limit: int | None = None
    used: int = 0
    most: int = 0

    def has(self, nbytes: int) -> bool:
        """Whether so many bytes are free."""
        return self.limit is None or self.used + nbytes <= self.limit

    @property
    def free(self) -> int | None:
        """None: no limit."""
        return None if self.limit is None else self.limit - self.used

    def take(self, nbytes: int) -> None:
        """Count them; whoever takes has made sure that they are free."""
        if not self.has(nbytes):
            raise RuntimeError(
                f"{nbytes:,} bytes are taken of {self.free:,}: a mistake in the planning, please report it"
            )
        self.used += nbytes
        self.most = max(self.most, self.used)

    def take_back(self, nbytes: int) -> None:
        """What was given for a moment; the caller gives it again, for good, as soon as something else has its room."""
        self.used += nbytes

    def give(self, nbytes: int) -> None:
        """They are free again."""
        self.used -= nbytes
        assert self.used >= 0
