"""One task's prefix, as a library holds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foreword.memory import Recall
from foreword.serve.tiers.forms import Form, plain
from foreword.serve.tiers.sizes import reader_bytes
from foreword.storage import Storage

if TYPE_CHECKING:
    from foreword.prefix import Prefix
    from foreword.sites import Site

DEVICE, CPU, FILE = TIERS = ("device", "cpu", "file")


@dataclass(eq=False, slots=True)
class Held:
    """A version of a task: one that is replaced or removed lives on while requests use it or wait for it.

    Its numbers are in one tier, in one form. Where the model can't read them as they are there (they are packed, or
    not on the device), whoever uses the task has a copy made, which goes when its room is needed.

    Attributes:
        form, tier: the numbers, and where they are.
        ready: what the model reads; None: nothing that it could.
        whole: bytes of ``ready``.
        size: bytes of ``form``.
        reader: bytes that a row of a mixed batch may hold of it.
        virtual: tokens at the site that has the most.
        recall: how its memory is read; None: it has none.
        storage: how it is written in few bits.
        shares: of attention, by site and token; None: not known, or it was shortened already.
        users: blocks and running requests that read it.
        waiting: requests in a queue that will.
        used: larger for those that were used later; 0: never.
        gone: the task has another version now, or none.
    """

    name: str
    form: Form
    storage: Storage
    dtype: torch.dtype
    priority: int = 0
    pinned: bool = False
    shares: Mapping[str, Tensor] | None = None
    tier: str | None = None
    ready: Prefix | None = None
    whole: int = 0
    size: int = 0
    reader: int = 0
    virtual: int = 0
    recall: Recall | None = None
    users: int = 0
    waiting: int = 0
    used: int = 0
    gone: bool = False

    @classmethod
    def of(
        cls, name: str, prefix: Prefix, sites: Iterable[Site], dtype: torch.dtype, storage: Storage, *,
        priority: int, pinned: bool, shares: Mapping[str, Tensor] | None,
    ) -> Held:  # fmt: skip
        """Of a prefix that is nowhere yet: its numbers are still the caller's."""
        own = prefix.storage
        few = own.keys.bits is not None and own.values.bits is not None
        # Numbers that come from few bits go back into them without loss, as long as nothing has rounded them.
        held = cls(name, plain(prefix), own if few and dtype == torch.float32 else storage, dtype, priority, pinned)
        held.shares = shares
        held.describe(prefix, sites)
        return held

    def describe(self, prefix: Prefix, sites: Iterable[Site]) -> None:
        """What is known of these numbers."""
        self.form = plain(prefix, lambda t: t.to(self.dtype))
        self.whole = self.size = self.form.size(None, self.dtype)
        self.reader = reader_bytes(prefix, sites, self.dtype)
        self.virtual = prefix.longest
        self.recall = prefix.recall if prefix.memory else None

    @property
    def own(self) -> bool:
        """Whether what the model reads is the form itself."""
        return self.tier == DEVICE and self.form.storage is None

    @property
    def device_bytes(self) -> int:
        copy = self.whole if self.ready is not None and not self.own else 0
        return copy + (self.size if self.tier == DEVICE else 0)

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the least important, then the one that was used least recently."""
        return self.priority, self.used

    def least(self, *, compress: bool, tokens: int | None) -> int:
        """Bytes of its form after what may still be done to it.

        Args:
            tokens: that may stay at a site; None: all.
        """
        most = tokens if self.shares is not None else None
        storages = {self.form.storage, self.storage if compress and self.form.storage is None else self.form.storage}
        return min(self.size, *(self.form.size(s, self.dtype, most=most) for s in storages))
