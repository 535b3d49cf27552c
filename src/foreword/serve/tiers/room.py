"""Who goes where, and who makes room for whom. Called with the lock of the holdings held.

Bytes are counted before they are taken, so no account is ever overdrawn; a prefix's numbers leave a place only after
they are in the next one, so none is ever lost; and nobody is touched where that wouldn't be enough.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch

from foreword.errors import BudgetError, ForewordError
from foreword.serve.budget import COMPRESS, MOVE, SHORTEN, Budget
from foreword.serve.tiers.accounts import Account
from foreword.serve.tiers.files import Files
from foreword.serve.tiers.forms import Form, plain
from foreword.serve.tiers.held import CPU, DEVICE, FILE, Held
from foreword.serve.tiers.usage import Counts
from foreword.sites import Site

log = logging.getLogger(__name__)
_CPU = torch.device("cpu")


class Room:
    """The tiers.

    Args:
        everyone: all versions of tasks that have a place.
        device, dtype: of what the model reads.
    """

    def __init__(
        self, budget: Budget, everyone: Callable[[], Iterable[Held]], device: torch.device, dtype: torch.dtype,
        sites: Sequence[Site],
    ) -> None:  # fmt: skip
        self.budget, self.everyone = budget, everyone
        self.device, self.dtype, self.sites = device, dtype, sites
        self.on_device, self.on_cpu = Account(budget.device_bytes), Account(budget.cpu_bytes)
        self.files = Files(budget.folder)
        self.counts = Counts()
        self.promised = 0  # of the device, to what isn't a prefix
        self._acts = tuple(a for a in budget.actions if a in (COMPRESS, SHORTEN, MOVE))

    # ---------------------------------------------------------------- one task

    def place(self, held: Held, without: Held | None) -> None:
        """Find a place for one that has none. It counts as used longer ago than any other.

        Args:
            without: a version that it replaces, and whose room is free already.

        Raises:
            BudgetError: there is no place.
        """
        what = f"task {held.name!r}"
        if held.pinned:
            self.free(held.whole, held.priority, what, without=without)
        elif MOVE not in self._acts:
            self.check(self._least(held), held.priority, what, without)
        for action in self._acts:
            if self.on_device.has(held.size):
                break
            if action != MOVE:
                # Of its own rank it is the one used longest ago: after those of lower ones, before the others.
                self._act(action, self._victims(held.priority - 1, without), held.size)
                if not self.on_device.has(held.size):
                    self._shrink(held, action)
                self._act(action, self._victims(held.priority, without), held.size)
                continue
            below = self._victims(held.priority - 1, without)
            if not self.on_device.has(held.size - self._left_by(below)):
                self._down(held)
                return
            self._act(MOVE, below, held.size)
        if not self.on_device.has(held.size):  # something couldn't be written
            raise self._refused(held.size, held.priority, what, without)
        self._settle(held)

    def ready(self, held: Held) -> None:
        """Have something on the device that the model can read of it.

        Raises:
            BudgetError: there is no room.
        """
        if held.ready is not None:
            return
        self.free(held.whole, held.priority, f"task {held.name!r}", without=held)
        self.on_device.take(held.whole)
        try:
            held.ready = held.form.prefix(self.device, self.dtype)
        except BaseException:
            self.on_device.give(held.whole)
            raise
        self.counts.moves_up += 1
        if held.tier == CPU and held.form.storage is None:  # one place is enough; a file stays, it costs no memory
            self.on_cpu.give(held.size)
            held.form, held.tier = plain(held.ready), DEVICE

    def discard(self, held: Held) -> None:
        """It is needed no longer."""
        if held.tier is not None:
            self.on_device.give(held.device_bytes)
            self._leave_tier(held)
        held.tier = held.ready = None

    def _settle(self, held: Held) -> None:
        """From nowhere onto the device, where there is room."""
        self.on_device.take(held.size)
        try:
            if held.form.storage is None:
                held.ready = held.form.prefix(self.device, self.dtype)
                held.form = plain(held.ready)
            else:
                held.form = held.form.in_memory(self.device)
        except BaseException:
            self.on_device.give(held.size)
            raise
        held.tier = DEVICE

    def _down(self, held: Held) -> None:
        """To CPU memory, or to a file where that is full. Where no file can be written it stays where it is.

        Raises:
            BudgetError: it has no place yet, and gets none.
        """
        to_cpu = held.tier != CPU and self._free_cpu(held)
        try:
            form = self._in_cpu_memory(held) if to_cpu else held.form.in_file(self.files)
        except OSError as exc:
            if held.tier is None:
                raise BudgetError(f"task {held.name!r} finds no room, and no file can be written: {exc}") from exc
            log.error("task %r can't be moved to a file: %s", held.name, exc)
            return
        self._drop_copy(held)
        if to_cpu:
            self.on_cpu.take(held.size)
        if held.tier == DEVICE:
            self.on_device.give(held.size)
            self.counts.evictions += held.ready is not None
        self._leave_tier(held)
        held.form, held.tier, held.ready = form, CPU if to_cpu else FILE, None
        self.counts.moves_down += 1

    def _in_cpu_memory(self, held: Held) -> Form:
        if held.tier is None and held.form.storage is None:  # the caller's own tensors
            held.form = plain(held.form.prefix(_CPU, self.dtype))
        return held.form.in_memory(_CPU, pinned=self.device.type == "cuda")

    def _leave_tier(self, held: Held) -> None:
        """What its form took below the device is free."""
        if held.tier == CPU:
            self.on_cpu.give(held.size)
        elif held.form.mapped is not None:
            self.files.remove(held.form.mapped)

    def _drop_copy(self, held: Held) -> None:
        """What was made to be read goes; its numbers are elsewhere."""
        if held.ready is not None and not held.own:
            held.ready = None
            self.on_device.give(held.whole)
            self.counts.evictions += 1

    def _shrink(self, held: Held, action: str) -> None:
        """In few bits, or of fewer tokens, where that takes fewer bytes and can be; on the device or nowhere yet."""
        before, storage = held.size, held.form.storage
        tokens = self._tokens(held) if action == SHORTEN else None
        if held.least(compress=action == COMPRESS and storage is None, tokens=tokens) >= before:
            return
        self._drop_copy(held)
        try:
            if tokens is not None:
                self._cut(held, tokens)
                storage = held.storage if storage is not None else None
            else:
                storage = held.storage
            form = held.form.packed(storage) if storage is not None else held.form
        except ForewordError as exc:  # numbers that few bits can't hold, shares of another prefix
            log.error("task %r stays as it is: %s", held.name, exc)
            return
        held.form, held.size, held.ready = form, form.nbytes, None
        if held.tier == DEVICE:
            self.on_device.give(before)
            held.tier = None
            self._settle(held)
            self.counts.evictions += held.ready is None
        self.counts.compressions += tokens is None
        self.counts.shortenings += tokens is not None

    def _cut(self, held: Held, tokens: int) -> None:
        """Keep the tokens with the largest shares of attention."""
        from foreword.compression.pruning import prune

        shares, held.shares = held.shares, None  # whatever comes of it, once is enough
        assert shares is not None
        held.describe(prune(held.form.prefix(_CPU, self.dtype), shares, tokens, uniform=True), self.sites)

    # ---------------------------------------------------------------- room for something

    def promise(self, more: int, priority: int) -> None:
        """Keep bytes of the device for something else, or fewer.

        Raises:
            BudgetError: there is no room.
        """
        if more > 0:
            self.free(more, priority, "what requests read and write")
            self.on_device.take(more)
        else:
            self.on_device.give(-more)
        self.promised += more

    def free(self, need: int, priority: int, what: str, *, without: Held | None = None) -> None:
        """Have so many bytes free on the device.

        Raises:
            BudgetError: they can't be had; then nobody was touched.
        """
        if self.on_device.has(need):
            return
        self.check(need, priority, what, without)
        victims = self._victims(priority, without)
        for held in victims:
            if self.on_device.has(need):
                return
            self._drop_copy(held)
        for action in self._acts:
            self._act(action, victims, need)
        if not self.on_device.has(need):  # something couldn't be written
            raise self._refused(need, priority, what, without)

    def check(self, need: int, priority: int, what: str, without: Held | None = None) -> None:
        """Raise BudgetError unless so many bytes can be had on the device."""
        if not self.on_device.has(need) and not self.on_device.has(
            need - self._left_by(self._victims(priority, without))
        ):
            raise self._refused(need, priority, what, without)

    def _act(self, action: str, victims: Iterable[Held], need: int) -> None:
        """Do one thing to one after the other until there is room."""
        for held in victims:
            if self.on_device.has(need):
                return
            if held.tier != DEVICE:
                self._drop_copy(held)
            elif action == MOVE:
                self._down(held)
            else:
                self._shrink(held, action)

    def _free_cpu(self, held: Held) -> bool:
        """Have room for one in CPU memory: those that are to go before it go to files. False: there is none."""
        below = [h for h in self.everyone() if h.tier == CPU and h.order < held.order]
        if not self.on_cpu.has(held.size - sum(h.size for h in below)):
            return False
        for other in sorted(below, key=lambda h: h.order):
            if not self.on_cpu.has(held.size):
                self._down(other)
        return self.on_cpu.has(held.size)

    def _victims(self, priority: int, without: Held | None) -> list[Held]:
        """Who may be touched for somebody of a priority, in this order."""
        found = [
            h for h in self.everyone()
            if not h.users and not h.pinned and h.priority <= priority and h.device_bytes and h is not without
        ]  # fmt: skip
        return sorted(found, key=lambda h: h.order)

    def _tokens(self, held: Held) -> int | None:
        """How many tokens a task may be shortened to; None: it can't be."""
        tokens = max(1, round(held.virtual * self.budget.keep))
        return tokens if held.shares is not None and tokens < held.virtual else None

    def _least(self, held: Held) -> int:
        """Bytes that a form has after all that the budget lets be done to it on the device."""
        tokens = self._tokens(held) if SHORTEN in self._acts else None
        return held.least(compress=COMPRESS in self._acts, tokens=tokens)

    def _left_by(self, victims: Iterable[Held]) -> int:
        """Bytes that they would leave free, if all is done that the budget lets be done."""
        if MOVE in self._acts:
            return sum(h.device_bytes for h in victims)
        return sum(h.device_bytes - (self._least(h) if h.tier == DEVICE else 0) for h in victims)

    def _refused(self, need: int, priority: int, what: str, without: Held | None) -> BudgetError:
        """With the numbers."""
        self.counts.refusals += 1
        sums = {"tasks in use": 0, "pinned ones": 0, f"those above priority {priority}": 0, "others": 0}
        in_use, fixed, above, others = sums
        for held in self.everyone():
            if held is not without:
                kind = in_use if held.users else fixed if held.pinned else above if held.priority > priority else others
                sums[kind] += held.device_bytes
        sums["running requests"] = self.promised
        held_by = ", ".join(f"{name} {nbytes:,}" for name, nbytes in sums.items() if nbytes) or "nothing"
        limit, free = self.on_device.limit or 0, self.on_device.free or 0
        return BudgetError(
            f"{what} needs {need:,} bytes on the device; {free:,} of {limit:,} are free (held by {held_by}). Raise "
            f"device_bytes, end or unpin something, or let more be done (when_full: {', '.join(self.budget.actions)})",
            needed=need, free=free, limit=limit,
        )  # fmt: skip
