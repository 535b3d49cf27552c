"""Budget: how much memory a library's prefixes and an engine's requests may take, and what happens when it is short."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foreword.errors import ConfigError
from foreword.storage import Storage

COMPRESS, SHORTEN, MOVE, QUEUE, REFUSE = ACTIONS = ("compress", "shorten", "move", "queue", "refuse")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory for keys and values, in tiers: the model's device, CPU memory, and a memory-mapped file.

    Counted on the device: the prefixes that are there, the copies of them that a mixed batch reads, and the keys and
    values of running requests, up to their last token. Not counted: the model, and what a pass computes on the way.

    Attributes:
        device_bytes: on the device; None: as many as there are.
        cpu_bytes: for prefixes that were moved out of the device; None: as many as there are, 0: none.
        when_full: what is done, in this order, when something more is to fit on the device; a comma-separated text
            or several names. Only tasks that nobody uses, that aren't pinned, and whose priority is not above that of
            whoever needs the room are touched, the least recently used first.

            ``compress``: written in few bits (:attr:`storage`); answers change a little, once.
            ``shorten``: of each site's tokens :attr:`keep` stay, those with the largest shares of attention, of tasks
            that were added with their shares; answers change, once.
            ``move``: down a tier, to CPU memory and from there to a file; answers don't change.
            ``queue``: a request waits until others have ended (without it, it is refused at once).
            ``refuse``: a :class:`BudgetError` with the numbers. It ends every list, also where it isn't named.
        storage: of ``compress``: ``"int8"`` or ``"int4"``.
        keep: of ``shorten``: the part of the tokens that stays.
        folder: for the mapped files, in a folder of their own, which is removed in the end; None: the system's for
            temporary files.

    Raises:
        ConfigError: a value makes no sense.
    """

    device_bytes: int | None = None
    cpu_bytes: int | None = None
    when_full: str | Sequence[str] = (MOVE, QUEUE, REFUSE)
    storage: Storage | str = "int8"
    keep: float = 0.5
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("device_bytes", 1), ("cpu_bytes", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name}={value!r}; expected a whole number of bytes, {least} or more")
        given = self.when_full.split(",") if isinstance(self.when_full, str) else self.when_full
        actions = tuple(a.strip() for a in given)
        _check_actions(actions)
        object.__setattr__(self, "when_full", actions)
        storage = Storage.of(self.storage) if isinstance(self.storage, str) else self.storage
        if storage.keys.bits is None or storage.values.bits is None:
            raise ConfigError(f'storage {self.storage!s} is not in few bits; expected "int8" or "int4"')
        object.__setattr__(self, "storage", storage)
        if not 0 < self.keep < 1:
            raise ConfigError(f"keep={self.keep}; expected a part of the tokens, above 0 and below 1")

    @property
    def actions(self) -> tuple[str, ...]:
        """:attr:`when_full` as a tuple."""
        return tuple(self.when_full)

    @property
    def packing(self) -> Storage:
        """:attr:`storage` as a Storage."""
        assert isinstance(self.storage, Storage)
        return self.storage


def _check_actions(actions: Sequence[str]) -> None:
    if not actions or (unknown := [a for a in actions if a not in ACTIONS]):
        said = f"{unknown[0]!r} is none of these" if actions else "when_full is empty"
        raise ConfigError(f"{said}; expected some of {', '.join(ACTIONS)}, in the order that they are tried in")
    if len(set(actions)) < len(actions):
        raise ConfigError(f"when_full names something twice: {', '.join(actions)}")
    for last, before in ((REFUSE, actions), (QUEUE, tuple(a for a in actions if a != REFUSE))):
        if last in before and before[-1] != last:
            raise ConfigError(
                f"when_full has {before[-1]!r} after {last!r}, where it would never be tried; expected compress, "
                "shorten, move in any order, then queue, then refuse"
            )


def parse_bytes(text: str) -> int:
    """``"500000"``, ``"200MB"``, ``"1.5 GiB"`` as bytes.

    Raises:
        ConfigError: it is none of these.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no number of bytes; expected one like 500000, 200MB or 1.5GiB")
    return (
        int(float(found[1]) * _UNITS[(found[2] or "").lower()])
        if "." in found[1]
        else (int(found[1]) * _UNITS[(found[2] or "").lower()])
    )
