"""Masks for [prefix; text]: everything here is made once per forward pass and reused by every layer.

A model builds its mask once and hands the same tensor to each layer, so what we derive from it is memoised
(``foreword._memo``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foreword._memo import kept_in_pass, memoised


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask (True: may see) as numbers to add to the scores; float masks as they are, in ``dtype``."""
    if mask is None or mask.dtype == dtype:
        return mask

    def make() -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)

    return memoised(mask, ("additive", dtype), make)


def dead_rows(mask: Tensor) -> Tensor:
    """``(B, 1|H, S|1)``: which queries see no key at all under an additive mask."""
    return memoised(mask, ("dead",), lambda: (mask == -torch.inf).all(-1))


def causal_mask(query: Tensor) -> Tensor:
    """``(1, 1, S, S)`` bool: position i sees 0..i. The same tensor for every layer of a pass."""
    length, device = query.shape[2], query.device
    return kept_in_pass(
        ("causal", length, device),
        lambda: torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None],
    )


def is_causal(module: nn.Module, query: Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
    """transformers' own rule: without a mask, a call of more than one query is causal unless it says otherwise."""
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    return query.shape[2] > 1 and mask is None and bool(causal)


def extend_mask(mask: Tensor, prefix: int, visible: Tensor | None, bias: Tensor | None) -> Tensor:
    """A text mask with the prefix's columns before it.

    Args:
        mask: ``(B|1, 1|H, S|1, N)``, bool or additive.
        prefix: P, the number of columns to add.
        visible: ``(B, P)`` bool, or numbers added to the scores; None when every row sees all of the prefix.
        bias: ``(B|1, H|1, S|1, 1)`` added to the scores of the prefix, or None. Makes the mask additive.

    Returns:
        ``(B|1, 1|H, S|1, P + N)`` of the mask's dtype (of the bias's when the mask was bool).
    """
    if visible is None and bias is None:
        return memoised(mask, ("extended", prefix), lambda: _prepend(mask, None, prefix))
    columns = visible[:, None, None, :] if visible is not None else None
    counts = columns is not None and columns.dtype != torch.bool
    if bias is None and mask.dtype == torch.bool and not counts:
        return _prepend(mask, columns, prefix)
    dtype = mask.dtype if mask.dtype != torch.bool else (bias.dtype if bias is not None else torch.float32)
    scores = torch.zeros(1, 1, 1, prefix, dtype=dtype, device=mask.device)
    if columns is not None:
        scores = scores + columns.to(dtype) if counts else scores.masked_fill(~columns, -torch.inf)
    if bias is not None:
        scores = scores + bias.to(dtype)
    return _prepend(additive(mask, dtype), scores, prefix)


def _prepend(mask: Tensor | None, columns: Tensor | None, prefix: int) -> Tensor:
    assert mask is not None
    if columns is None:
        fill = True if mask.dtype == torch.bool else 0
        columns = torch.full((1, 1, 1, prefix), fill, dtype=mask.dtype, device=mask.device)
    shape = [max(m, c) for m, c in zip(mask.shape[:3], columns.shape[:3], strict=True)]
    return torch.cat([columns.expand(*shape, prefix), mask.expand(*shape, mask.shape[-1])], dim=-1)
