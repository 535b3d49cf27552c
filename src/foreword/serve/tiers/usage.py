"""What a library holds where, for people and for machines that look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """Since the library was made.

    Attributes:
        evictions: tasks that were taken off the device, by dropping a copy or by a move.
        moves_down, moves_up: between tiers.
        compressions, shortenings: of tasks.
        refusals: of something that found no room.
    """

    evictions: int = 0
    moves_down: int = 0
    moves_up: int = 0
    compressions: int = 0
    shortenings: int = 0
    refusals: int = 0


@dataclass(frozen=True, slots=True)
class TierUse:
    """Of a tier.

    Attributes:
        tasks: whose numbers are there.
        nbytes: that are used, copies and caches included.
        most: bytes that ever were.
        limit: None: there is none.
    """

    tasks: int
    nbytes: int
    most: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class TaskUse:
    """Of a task.

    Attributes:
        tier: where its numbers are: ``device``, ``cpu`` or ``file``.
        storage: ``plain``, or in how many bits they are.
        nbytes: of them there.
        device_bytes: that it takes on the device, a copy that the model can read included.
        users: blocks and running requests that read it.
    """

    tier: str
    storage: str
    nbytes: int
    device_bytes: int
    virtual_tokens: int
    priority: int
    pinned: bool
    users: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a library.

    Attributes:
        caches: bytes promised to running requests and to batches of several tasks; part of the device's.
        leaving: versions of tasks that were replaced or removed, and are still used.
    """

    tiers: Mapping[str, TierUse]
    tasks: Mapping[str, TaskUse]
    caches: int
    leaving: int
    counts: Counts = field(default_factory=Counts)
