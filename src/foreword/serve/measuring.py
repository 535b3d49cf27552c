"""How much of the attention a task's prefix gets over one text, read by parts between the steps of an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from foreword.prefix import Prefix
from foreword.serve._calls import Calls
from foreword.serve._mixing import choose
from foreword.serve.library import Library
from foreword.shares import measured_shares

_MOST_SCORES = 1 << 23  # of a site, held at once: 32 MiB, a few times over


class Measurement:
    """The shares of one row: what ``fw.attention_shares`` gives for the whole text, as means over the heads.

    Args:
        tokens: a prompt and its answer.
        output_from: the answer's first token, for prefixes that only the output sees.
        step_tokens: that are read in one :meth:`go_on`, at most; fewer where the model has many heads.
    """

    def __init__(
        self,
        library: Library,
        prefix: Prefix | None,
        strength: float,
        tokens: Sequence[int],
        *,
        output_from: int,
        step_tokens: int,
    ) -> None:
        self._calls, self._choice = Calls(library), choose([prefix], [strength])
        self._ids = torch.tensor([list(tokens)], device=self._calls.device)
        self._output_from, self._cache, self._read = output_from, DynamicCache(), 0
        self._step = max(1, min(step_tokens, _MOST_SCORES // (len(tokens) * max(s.heads for s in library.sites))))
        self._parts: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def go_on(self) -> bool:
        """Read a part. Returns whether that was the last; the model must be at nothing else meanwhile."""
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
