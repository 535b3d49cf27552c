"""What an attention site reads: keys and values, who sees them, how strongly, and a memory beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foreword.errors import AttachError
from foreword.memory import SiteMemory
from foreword.visibility import Visibility


@dataclass(frozen=True, slots=True)
class SitePrefix:
    """What one attention site reads during one forward pass.

    Shapes: T tasks, G key/value heads, P virtual tokens, H query heads, B batch rows.
    """

    keys: Tensor  # (T, G, P, key_dim)
    values: Tensor  # (T, G, P, value_dim)
    rows: Tensor | None = None  # (R,) the task of each row; B must be a multiple of R. None: T is 1, or one a row
    # (T, P) bool, False where a shorter task is padded; or log-weights of the tokens, added to their scores. None: all
    visible: Tensor | None = None
    bias: Tensor | None = None  # (H,) or (T, H), added to the prefix's log-sum-exp
    gate: Tensor | None = None  # (H,) or (T, H): if given, o1 + gate * o2 instead of one softmax
    gated: Tensor | None = None  # (T,) bool: the tasks that `gate` is for. None: all
    reading: Tensor | None = None  # (H, key_dim + 1) or (T, ...): a weight on the prefix read off each query
    seen_by: tuple[Visibility, ...] | None = None  # T rules, for which queries see the prefix. None: all do
    memory: SiteMemory | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @property
    def plain(self) -> bool:
        """Whether there is nothing but keys and values, the same for all rows."""
        alone = self.rows is None and self.keys.shape[0] == 1
        return alone and self.bias is None and self.gate is None and self.reading is None

    def for_batch(self, query: Tensor, seen: Tensor | None = None) -> BatchPrefix:
        """The same prefix in the query's dtype and device, one entry a row unless all rows share it.

        Args:
            seen: ``(B|1, S)`` which queries see the prefix; None: all.
        """
        keys, values, visible, rows = self.keys, self.values, self.visible, self.rows
        as_it_is = seen is None and self.plain and keys.dtype is query.dtype
        # Two questions to the tensors are cheaper than comparing devices, at each layer of each token.
        if as_it_is and ((keys.is_cpu and query.is_cpu) or keys.device == query.device):
            return BatchPrefix(keys, values, visible)
        keys, values = keys.to(query), values.to(query)
        if rows is not None:
            rows = rows_of(rows, query)
            keys, values = keys[rows], values[rows]
            visible = visible.to(query.device)[rows] if visible is not None else None
        elif len(keys) > 1 and len(keys) != query.shape[0]:
            times = _times(len(keys), query, "prefixes were made")
            keys, values = keys.repeat_interleave(times, 0), values.repeat_interleave(times, 0)
        gate = _by_query(self.gate, rows, query)
        if gate is not None:
            gate = gate.to(query.dtype)
            if seen is not None:
                gate = gate * seen[:, None, :, None]
            if self.gated is None or rows is None:
                return BatchPrefix(keys, values, visible, None, gate)
        bias = _by_query(self.bias, rows, query)
        if gate is not None and self.gated is not None and rows is not None:  # these rows' softmaxes stay apart
            apart = self.gated.to(query.device)[rows][:, None, None, None]
            bias = _plus(bias, torch.zeros(apart.shape, device=query.device).masked_fill_(apart, -torch.inf))
        if self.reading is not None:
            bias = _plus(bias, _read_off(self.reading, rows, query))
        if seen is not None:
            hidden = torch.zeros(seen.shape, device=query.device).masked_fill_(~seen, -torch.inf)
            bias = _plus(bias, hidden[:, None, :, None])
        return BatchPrefix(keys, values, visible, bias, gate)


@dataclass(frozen=True, slots=True)
class BatchPrefix:
    """What one attention call reads: a :class:`SitePrefix` for this batch. ``Bp`` is B, or 1 when all rows share it."""

    keys: Tensor  # (Bp, G, P, key_dim)
    values: Tensor  # (Bp, G, P, value_dim)
    visible: Tensor | None = None  # (Bp, P) bool or log-weights
    bias: Tensor | None = None  # (B|1, H|1, S|1, 1) added to the prefix's log-sum-exp
    gate: Tensor | None = None  # (B|1, H|1, S|1, 1): with it and no bias, all rows' softmaxes stay apart

    @property
    def length(self) -> int:
        return self.keys.shape[2]


def rows_of(rows: Tensor, query: Tensor) -> Tensor:
    """The task of each row of the batch: ``(B,)``.

    Raises:
        AttachError: the batch isn't a multiple of the rows named.
    """
    return rows.to(query.device).repeat_interleave(_times(len(rows), query, "tasks were named"))


def _times(rows: int, query: Tensor, what: str) -> int:
    """How often each row named stands in the batch."""
    batch = query.shape[0]
    if batch % rows:
        raise AttachError(
            f"the batch has {batch} rows but {rows} {what}; name one a row "
            "(beams and return sequences are multiplied for you)"
        )
    return batch // rows


def _by_query(weights: Tensor | None, rows: Tensor | None, query: Tensor) -> Tensor | None:
    """Per-head numbers ``(H,)`` or ``(T, H)`` -> ``(B|1, H, 1, 1)``."""
    if weights is None:
        return None
    weights = weights.to(query.device)
    if weights.dim() == 2:
        weights = weights[rows] if rows is not None else weights
        return weights[:, :, None, None]
    return weights[None, :, None, None]


def _read_off(reading: Tensor, rows: Tensor | None, query: Tensor) -> Tensor:
    """A weight for each query and head as a bias, ``log(2 sigmoid(q . w + b))``: ``(B, H, S, 1)``; 0 while w, b are.

    Args:
        reading: ``(H, key_dim + 1)``, or ``(T, H, key_dim + 1)`` with ``rows``, the task of each row of the batch.
    """
    reading = reading.to(query)
    reading = reading if reading.dim() == 3 else reading[None]
    own = reading if rows is None or len(reading) == 1 else reading[rows]
    weights, offset = own[..., None, :-1], own[..., -1:, None]  # (B|1, H, 1, D) and (B|1, H, 1, 1)
    scores = (query * weights).sum(-1, keepdim=True) + offset  # on CPUs twice as fast as a product with one column
    return torch.nn.functional.logsigmoid(scores) + math.log(2)


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
