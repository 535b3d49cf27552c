"""The tasks of a library by name, who uses them, and where they are. Safe to call from any thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foreword.errors import ConfigError, nearest
from foreword.prefix import Prefix
from foreword.serve.budget import Budget
from foreword.serve.tiers.held import CPU, DEVICE, FILE, TIERS, Held
from foreword.serve.tiers.room import Room
from foreword.serve.tiers.usage import TaskUse, TierUse, Usage
from foreword.sites import Site


class Promise:
    """Bytes on the device that are kept for something that isn't a prefix."""

    def __init__(self) -> None:
        self.nbytes = 0


class Holdings:
    """What a library holds.

    Args:
        device, dtype: of what the model reads.
        sites: of the model.
    """

    def __init__(self, budget: Budget, device: torch.device, dtype: torch.dtype, sites: Sequence[Site]) -> None:
        self.budget, self.device, self.dtype, self.sites = budget, device, dtype, sites
        self.released: list[Callable[[], None]] = []  # called when something was, outside of the lock
        self._tasks: dict[str, Held] = {}
        self._leaving: set[Held] = set()
        self._room = Room(budget, self._everyone, device, dtype, sites)
        self._clock = itertools.count(1)
        self._lock = threading.RLock()

    # ---------------------------------------------------------------- tasks by name

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def find(self, name: str) -> Held:
        """Raises ConfigError, with near names, if there is none."""
        held = self._tasks.get(name)
        if held is None:
            raise ConfigError(f"no task is named {name!r}; {nearest(name, self.names)}")
        return held

    def prefix(self, name: str) -> Prefix:
        """A task's prefix: what the model reads, or a copy of the caller's own where nothing of that is there."""
        with self._lock:
            held = self.find(name)
            return held.ready if held.ready is not None else held.form.prefix(self.device, self.dtype)

    def add(
        self, name: str, prefix: Prefix, *, priority: int = 0, pinned: bool = False,
        shares: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Find a place for a prefix. A task of the same name is replaced; if there is no place, it stays.

        Raises:
            BudgetError: there is no place.
        """
        new = Held.of(
            name, prefix, self.sites, self.dtype, self.budget.packing, priority=priority, pinned=pinned, shares=shares
        )
        with self._lock:
            old, account = self._tasks.get(name), self._room.on_device
            # The room of a version that nobody uses is the new one's. If that is refused, nothing has come into it.
            spare = old.device_bytes if old is not None and not old.users and not old.waiting else 0
            account.give(spare)
            try:
                self._room.place(new, without=old)
            finally:
                account.take_back(spare)
            self._tasks[name] = new
            if old is not None:
                self._leave(old)
        self._tell()

    def remove(self, name: str) -> None:
        """Forget a task; whoever uses it or waits for it goes on with it."""
        with self._lock:
            held = self.find(name)
            del self._tasks[name]
            self._leave(held)
        self._tell()

    def pin(self, name: str, pinned: bool) -> None:
        """Keep a task on the device, as it is, whatever comes; or no longer.

        Raises:
            BudgetError: it isn't there, and there is no room.
        """
        with self._lock:
            held = self.find(name)
            if pinned:
                self._room.ready(held)
            held.pinned = pinned

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            for held in self._tasks.values():
                self._leave(held)
            self._tasks.clear()
            self._room.files.close()

    # ---------------------------------------------------------------- whoever reads

    def expect(self, name: str) -> Held:
        """A task as it is now, for somebody who will use it later, and says so with :meth:`forget` in the end."""
        with self._lock:
            held = self.find(name)
            held.waiting += 1
            return held

    def forget(self, held: Held) -> None:
        """Whoever expected it doesn't do so any longer."""
        with self._lock:
            held.waiting -= 1
            self._discard_if_done(held)

    def use(self, names: Iterable[str], promise: Promise, rows: int) -> list[Held]:
        """Have tasks ready for a block that reads them, until :meth:`release`.

        Args:
            rows: of the batch that are mixed; 0: all read the same.

        Raises:
            ConfigError: one is unknown.
            BudgetError: there is no room.
        """
        with self._lock:
            held = [self.find(n) for n in names]
            copies = rows * max((h.reader for h in held), default=0)
            self.acquire(held, promise, copies, max((h.priority for h in held), default=0))
            return held

    def acquire(self, held: Sequence[Held], promise: Promise, nbytes: int, priority: int) -> None:
        """Have versions of tasks ready to be read, and a promise changed: both or neither.

        Args:
            priority: of the promise.

        Raises:
            BudgetError: there is no room.
        """
        with self._lock:
            for one in held:
                one.users += 1
            try:
                self._check_together(held, nbytes - promise.nbytes, priority)
                for one in held:
                    self._room.ready(one)
                self.change(promise, nbytes, priority)
            except BaseException:
                for one in held:
                    one.users -= 1
                raise
            for one in held:
                one.used = next(self._clock)

    def release(self, held: Iterable[Held], promise: Promise | None = None) -> None:
        """They are used by one less, and nothing is promised any more."""
        with self._lock:
            for one in held:
                one.users -= 1
                self._discard_if_done(one)
            if promise is not None:
                self.change(promise, 0)
        self._tell()

    def change(self, promise: Promise, nbytes: int, priority: int = 0) -> None:
        """Make a promise larger or smaller.

        Raises:
            BudgetError: there is no room for a larger one.
        """
        with self._lock:
            self._room.promise(nbytes - promise.nbytes, priority)
            promise.nbytes = nbytes

    def in_use(self) -> bool:
        """Whether anybody uses anything, and so will leave room."""
        with self._lock:
            return self._room.promised > 0 or any(h.users for h in self._everyone())

    def _check_together(self, held: Sequence[Held], more: int, priority: int) -> None:
        """Raise BudgetError where all of it can't be had, before anybody is pushed out for a part of it."""
        asked = [h for h in dict.fromkeys(held) if h.ready is None]
        levels = {h.priority for h in asked} | ({priority} if more > 0 else set())
        if len(levels) == 1:  # else who may be touched differs
            named = ", ".join(repr(h.name) for h in asked[:3]) + (" …" if len(asked) > 3 else "")
            what = f"task {named} with what its rows read and write" if asked else "what requests read and write"
            self._room.check(max(0, more) + sum(h.whole for h in asked), levels.pop(), what)

    def _leave(self, held: Held) -> None:
        held.gone = True
        self._leaving.add(held)
        self._discard_if_done(held)

    def _discard_if_done(self, held: Held) -> None:
        if held.gone and not held.users and not held.waiting:
            self._leaving.discard(held)
            self._room.discard(held)

    def _everyone(self) -> Iterable[Held]:
        return itertools.chain(self._tasks.values(), self._leaving)

    def _tell(self) -> None:
        for tell in self.released:
            tell()

    # ---------------------------------------------------------------- what is where

    def usage(self) -> Usage:
        """As it is now."""
        room = self._room
        with self._lock:
            used = {
                DEVICE: (room.on_device.used, room.on_device.most, room.on_device.limit),
                CPU: (room.on_cpu.used, room.on_cpu.most, room.on_cpu.limit),
                FILE: (room.files.nbytes, room.files.most, None),
            }
            tiers = {t: TierUse(sum(h.tier == t for h in self._everyone()), *used[t]) for t in TIERS}
            tasks = {name: _use_of(held) for name, held in self._tasks.items()}
            return Usage(tiers, tasks, room.promised, len(self._leaving), replace(room.counts))


def _use_of(held: Held) -> TaskUse:
    storage = held.form.storage
    return TaskUse(
        held.tier or "", "plain" if storage is None else f"int{storage.keys.bits}", held.size, held.device_bytes,
        held.virtual, held.priority, held.pinned, held.users,
    )  # fmt: skip
