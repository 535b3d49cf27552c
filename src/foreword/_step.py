"""A step of generation: few queries over a large cache, without a copy of it.

The scores of the prefix and of the text are computed apart and meet in one softmax (the equation of
``foreword.attention``, literally). Concatenating keys and values would copy the whole cache for each new token.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from foreword._masks import additive, dead_rows, extend_mask
from foreword._memo import current, memoised

if TYPE_CHECKING:
    from foreword._views import BatchPrefix, SitePrefix


def step(
    prefix: BatchPrefix | SitePrefix,
    query: Tensor,  # (B, H, S, key_dim)
    key: Tensor,  # (B, G, N, key_dim)
    value: Tensor,  # (B, G, N, value_dim)
    hidden: Tensor | None,  # (B|1, 1|H, S|1, P + N) added to the scores
    scale: float,
) -> Tensor:
    """``softmax(q [P_k; K]^T * scale) [P_v; V]``: ``(B, S, H, value_dim)``."""
    batch, heads, queries, dim = query.shape
    _, groups, texts, _ = key.shape
    before, before_values = prefix.keys, prefix.values
    shared, prefixed = before.shape[0] != batch, before.shape[2]
    # Three dimensions: batched products of four cost a good part of a small step in views alone.
    rows = query.reshape(batch * groups, -1, dim)  # the queries of a group's heads are rows of one product
    scores = torch.bmm(rows, key.flatten(0, 1).mT).view(batch, groups, -1, texts)
    scores = torch.cat((_times(rows, before.mT, batch, shared), scores), dim=-1).mul_(scale)
    dead = None
    if hidden is not None and (prefix.visible is not None or prefix.bias is not None):
        dead = dead_rows(hidden).unsqueeze(-1)  # a padded query that sees no prefix sees nothing at all
        hidden = hidden.masked_fill(dead, 0.0)  # an empty softmax is not a number: zeroed below
    if hidden is not None:
        scores.view(batch, heads, queries, -1).add_(hidden)
    weights = torch.softmax(scores, dim=-1)
    if dead is not None:
        weights = weights.view(batch, heads, queries, -1).masked_fill(dead, 0.0).view(weights.shape)
    out = torch.bmm(weights[..., prefixed:].flatten(0, 1), value.flatten(0, 1)).view(batch, groups, rows.shape[1], -1)
    out = out + _times(weights[..., :prefixed], before_values, batch, shared)
    if queries == 1:
        return out.view(batch, 1, heads, -1)
    return out.view(batch, heads, queries, -1).transpose(1, 2).contiguous()


def repeated(prefix: SitePrefix, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor | None:
    """What the last layer added to its scores, if this one differs by its layer only: the same mask, a like prefix.

    A model hands one mask to all layers, so what was decided in the first holds in the others, and deciding costs
    more there than several of a step's products. The caller has seen that the call carries nothing else.
    """
    if is_compiling() or (last := current.step) is None:
        return None
    held, version, length, hidden = last
    if held() is not mask or mask._version != version or prefix.keys.shape[2] != length:
        return None
    dtype = query.dtype
    one_dtype = hidden.dtype is dtype and prefix.keys.dtype is dtype and key.dtype is dtype and value.dtype is dtype
    return hidden if one_dtype and prefix.plain and prefix.visible is None else None


def joint_mask(prefix: BatchPrefix, mask: Tensor | None, query: Tensor, keys: int) -> Tensor | None:
    """What is added to the scores: ``(B|1, 1|H, S|1, P + N)``, or None where every query sees all."""
    alike = prefix.visible is None and prefix.bias is None
    if mask is None:
        if alike:
            return None
        mask = torch.zeros(1, 1, 1, keys, dtype=query.dtype, device=query.device)
    numbers = additive(mask, query.dtype)
    assert numbers is not None
    if prefix.bias is None and prefix.visible is not None:
        hidden = memoised(
            numbers, ("joint", prefix.length), lambda: extend_mask(numbers, prefix.length, prefix.visible, None),
            beside=prefix.visible,
        )  # fmt: skip
    else:
        hidden = extend_mask(numbers, prefix.length, prefix.visible, prefix.bias)
    if alike and query.shape[2] == 1 and not mask.is_inference() and not is_compiling() and current.open:
        current.step = (weakref.ref(mask), mask._version, prefix.length, hidden)
    return hidden


def _times(rows: Tensor, states: Tensor, batch: int, shared: bool) -> Tensor:
    """``(B, G, R, X) by (B|1, G, X, Y)``: one product a group when all rows of the batch share the prefix."""
    _, groups, width, dim = states.shape
    if not shared:
        return torch.bmm(rows.reshape(batch * groups, -1, width), states.flatten(0, 1)).view(batch, groups, -1, dim)
    folded = rows.view(batch, groups, -1, width).transpose(0, 1).reshape(groups, -1, width)
    return torch.bmm(folded, states[0]).view(groups, batch, -1, dim).transpose(0, 1)
