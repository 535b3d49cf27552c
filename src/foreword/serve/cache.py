"""The keys and values of the rows that are written together: rows come and go, a token is written in place.

All rows end at the same column, so a step writes one column of every row and all masks of transformers (causal, sliding
window, chunks) hold as they are: it is a left-padded batch, as ``generate`` has it. ::

    column     0        start           end      capacity
    row 0      .  .  .  t  t  t  t  t  t  |  .  .  .
    row 1      .  .  .  0  0  0  t  t  t  |  .  .  .      0: padding, in view and hidden by the mask

Every number in view is a row's own or zero: what an earlier row left there could be infinite, and hiding it would not
help (0 times infinity). Rows are dense: where one leaves, the last one takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

_SPARE = 64  # columns allocated beyond those in use, at least; a quarter of them where that is more


def capacity_for(width: int) -> int:
    """Columns that are allocated for rows of so many tokens."""
    return width + max(_SPARE, width // 4)


class RowCache(Cache):
    """Keys and values of a left-padded batch whose rows join and leave.

    Args:
        exact: allocate as many places as there are rows; else up to twice as many, so that fewer joins move them.

    Attributes:
        lengths: tokens of each row.
        capacity: columns allocated for each row.
        places: rows allocated.
    """

    def __init__(self, *, exact: bool = False) -> None:
        super().__init__(layers=[])
        self._exact = exact
        self.lengths: list[int] = []
        self.end = 0
        self.capacity = 0
        self.places = 0
        self.pass_rows, self.pass_seen = slice(0, 0), 0  # those that a pass is for, and the columns that they see
        self._mask = torch.zeros(0, 0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Columns in view: tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def padding(self) -> int:
        """Columns in view that are no row's token."""
        return len(self.lengths) * self.width - sum(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.numel() * t.element_size() for layer in self._held() for t in (layer.keys, layer.values))

    # ---------------------------------------------------------------- rows

    def join(self, source: DynamicCache, picks: Sequence[int], lengths: Sequence[int]) -> None:
        """Add rows of a cache that a prompt has been read into.

        Args:
            source: a left-padded batch.
            picks: its rows; one may be named several times.
            lengths: tokens of each of them, at the end of its row.
        """
        first, longest = len(self.lengths), max(lengths)
        self._make_room(first + len(picks), max(longest, self.width))
        while len(self.layers) < len(source.layers):
            self.layers.append(_RowLayer(self))
        for layer, theirs in zip(self._layers, source.layers, strict=True):
            if isinstance(theirs, DynamicLayer) and theirs.is_initialized:  # layers may share another's
                layer.take(theirs, first, picks, lengths, self.end)
        for place, length in enumerate(lengths, first):
            self._mask[place] = torch.arange(self.capacity, device=self._mask.device) >= self.end - length
        self.lengths += lengths

    def leave(self, row: int) -> None:
        """Take a row out; the last one moves to its place."""
        last = len(self.lengths) - 1
        if row != last:
            start = self.end - self.lengths[last]
            for layer in self._held():
                for states in (layer.keys, layer.values):
                    states[row, :, : self.end] = 0.0
                    states[row, :, start : self.end] = states[last, :, start : self.end]
            self._mask[row] = self._mask[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    # ---------------------------------------------------------------- a pass of one token a row

    @contextmanager
    def passing(self, first: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inside the block the model writes the next token of the rows ``first:stop`` and sees these rows only.

        It may be run again for the same rows (nothing counts until :meth:`advance`). Gives the attention mask
        ``(R, width + 1)`` and the position of each row's new token ``(R, 1)``.
        """
        self.pass_rows = slice(first, stop)
        self.pass_seen = max(self.lengths[first:stop])
        start = self.end - self.pass_seen
        positions = torch.tensor(self.lengths[first:stop], device=self._mask.device)[:, None]
        yield self._mask[first:stop, start : self.end + 1], positions

    def advance(self) -> None:
        """The pass has written a token to every row."""
        self.end += 1
        self.lengths = [n + 1 for n in self.lengths]

    def prepare(self) -> None:
        """Have room for one more token."""
        if self.end == self.capacity:
            self._make_room(len(self.lengths), self.width)

    # ---------------------------------------------------------------- memory

    def tighten(self) -> None:
        """Give back places and columns that are not needed any more."""
        if len(self.lengths) < self.places or capacity_for(self.width) < self.capacity:
            self._move(len(self.lengths), self.width)

    def _make_room(self, rows: int, width: int) -> None:
        """Have ``rows`` places, ``width`` columns before the end and one after it; moves what is there if need be."""
        if rows <= self.places and width <= self.end < self.capacity:
            return
        self._move(rows, width)

    def _move(self, rows: int, width: int) -> None:
        places = 1  # anew, so that places which are not needed any more go
        while places < rows:
            places *= 2
        places = rows if self._exact else places
        capacity = capacity_for(width)
        for layer in self._held():
            layer.move(places, capacity, len(self.lengths), self.width, self.end, width)
        mask = torch.zeros(places, capacity, dtype=torch.bool, device=self._mask.device)
        for row, length in enumerate(self.lengths):
            mask[row, width - length :] = True
        self.places, self.capacity, self.end, self._mask = places, capacity, width, mask

    @property
    def _layers(self) -> list[_RowLayer]:
        return cast("list[_RowLayer]", self.layers)

    def _held(self) -> list[_RowLayer]:
        """The layers that have keys and values."""
        return [layer for layer in self._layers if layer.is_initialized]


class _RowLayer(CacheLayerMixin):
    """One layer: keys ``(places, heads, capacity, key_dim)`` and values."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        cache = self.cache
        self.dtype, self.device = key_states.dtype, key_states.device
        cache._mask = cache._mask.to(self.device)
        self.keys, self.values = (
            s.new_zeros(cache.places, s.shape[1], cache.capacity, s.shape[3]) for s in (key_states, value_states)
        )
        self.is_initialized = True

    def take(self, source: CacheLayerMixin, first: int, picks: Sequence[int], lengths: Sequence[int], end: int) -> None:
        """Copy rows of another cache's layer to the places from ``first`` on, so that they end at ``end``."""
        assert source.keys is not None and source.values is not None
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            mine[first : first + len(picks)] = 0.0
            for place, (pick, length) in enumerate(zip(picks, lengths, strict=True), first):
                mine[place, :, end - length : end] = theirs[pick, :, theirs.shape[2] - length :]

    def move(self, places: int, capacity: int, rows: int, width: int, end: int, new_end: int) -> None:
        """Into tensors of another size, the columns in view ending at ``new_end``."""
        moved = []
        for states in (self.keys, self.values):
            new = states.new_zeros(places, states.shape[1], capacity, states.shape[3])
            new[:rows, :, new_end - width : new_end] = states[:rows, :, end - width : end]
            moved.append(new)
        self.keys, self.values = moved

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        rows, end = self.cache.pass_rows, self.cache.end
        start = end - self.cache.pass_seen
        self.keys[rows, :, end : end + 1] = key_states
        self.values[rows, :, end : end + 1] = value_states
        return self.keys[rows, :, start : end + 1], self.values[rows, :, start : end + 1]

    def get_seq_length(self) -> int:
        return self.cache.pass_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.pass_seen + query_length, 0

    def get_max_length(self) -> int:
        return -1
