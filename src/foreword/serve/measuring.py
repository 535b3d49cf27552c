"""How much of the attention a task's prefix gets over one text, read by parts between the steps of an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from foreword.serve._calls import Calls
from foreword.serve._mixing import choose
from foreword.serve.library import Library
from foreword.serve.tiers.holdings import Promise
from foreword.shares import measured_shares

_MOST_SCORES = 1 << 23  # of a site, held at once: 32 MiB, a few times over


class Measurement:
    """The shares of one row: what ``fw.attention_shares`` gives for the whole text, as means over the heads.

    The task is the one that the name has now, whatever becomes of the name. :meth:`close` lets go of it.

    Args:
        task: None: the base model.
        tokens: a prompt and its answer.
        output_from: the answer's first token, for prefixes that only the output sees.
        step_tokens: that are read in one :meth:`go_on`, at most; fewer where the model has many heads.
        column_bytes: of a token's keys and values, which the library's budget counts.

    Raises:
        ConfigError: the task is unknown.
    """

    def __init__(
        self,
        library: Library,
        task: str | None,
        strength: float,
        tokens: Sequence[int],
        *,
        output_from: int,
        step_tokens: int,
        column_bytes: int = 0,
    ) -> None:
        self._holdings, self._strength = library.holdings, strength
        self._held = self._holdings.expect(task) if task is not None else None
        self._promise, self._bytes = Promise(), len(tokens) * column_bytes
        self._calls = Calls(library)
        self._ids = torch.tensor([list(tokens)], device=self._calls.device)
        self._output_from, self._cache, self._read = output_from, DynamicCache(), 0
        self._step = max(1, min(step_tokens, _MOST_SCORES // (len(tokens) * max(s.heads for s in library.sites))))
        self._parts: dict[str, list[Tensor]] = {}
        self._acquired = self._closed = False

    @property
    def virtual_tokens(self) -> int:
        """Of the task, at the site that has the most."""
        return self._held.virtual if self._held is not None else 0

    def _begin(self) -> None:
        """Have room, and the task where the model can read it."""
        mine = [self._held] if self._held is not None else []
        level = self._held.priority if self._held is not None else 0
        self._holdings.acquire(mine, self._promise, self._bytes, level)
        self._acquired = True
        self._choice = choose([self._held.ready if self._held is not None else None], [self._strength])

    def close(self) -> None:
        """Let go of the task and of what it took, while no part is being read; nothing is read afterwards."""
        if self._closed:
            return
        self._closed = True
        if self._acquired:
            self._holdings.release([self._held] if self._held is not None else [], self._promise)
        if self._held is not None:
            self._holdings.forget(self._held)
        self._cache = DynamicCache()

    @torch.no_grad()
    def go_on(self) -> bool:
        """Read a part. Returns whether that was the last; the model must be at nothing else meanwhile.

        Raises:
            BudgetError: there is no room for the text's keys and values, or for the task.
        """
        if self._closed:  # its caller has left while this waited for its turn
            return True
        if not self._acquired:
            self._begin()
        start, length = self._read, self._ids.shape[1]
        stop = self._read = min(length, start + self._step)
        positions = torch.arange(start, stop, device=self._ids.device)[None]
        seen = torch.ones(1, stop, dtype=torch.bool, device=self._ids.device)
        with measured_shares(self._calls.model) as found:
            self._calls(self._choice, self._ids[:, start:stop], seen, positions, self._cache, self._output_from)
        for site, share in found.items():
            self._parts.setdefault(site, []).append(share[0].mean(0))
        return stop == length

    @property
    def shares(self) -> dict[str, Tensor]:
        """``(S,)`` of each site that reads virtual tokens, in the order that the model calls them."""
        return {site: torch.cat(parts) for site, parts in self._parts.items()}
