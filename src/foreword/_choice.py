"""Which path an attention call takes: by size, as benchmarks/attention.py measured.

*Concatenation* copies the keys and values, of the prefix for each row and of the text. A *step* (few queries) copies
neither but makes more calls, which pays from a few hundred cached tokens on. *Merging* pays for a second kernel call
and the join; it saves all rows' copies of a long prefix, and half of the scores where the text is long and causal,
because the text keeps its causal kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

if TYPE_CHECKING:
    from foreword._views import BatchPrefix

Path = Literal["merged", "concat", "step"]

FEW_QUERIES = 8
LONG_PREFIX = 512
VERY_LONG_PREFIX = 2048
LONG_TEXT = 768  # causal without a mask


def cheapest(query: Tensor, key: Tensor, prefix: BatchPrefix, mask: Any) -> Path:
    """The path that is fastest for these sizes (measured on CPUs)."""
    batch, _, queries, _ = query.shape
    if queries <= 2 * FEW_QUERIES:  # a step of generation, or a short prompt
        texts = key.shape[2] if mask is not None or queries == 1 else queries  # causal: the rest of a cache is empty
        copied = batch * (texts + prefix.length)
        stepping = queries == 1 or (mask is not None and queries <= FEW_QUERIES)
        if stepping and not (queries > 1 and prefix.length >= VERY_LONG_PREFIX):
            return "step" if copied + 64 * batch >= 800 + 50 * queries else "concat"
        return "merged" if copied >= 1200 + 80 * queries else "concat"
    if mask is None and queries >= LONG_TEXT:
        return "merged"
    if query.requires_grad or prefix.keys.requires_grad:  # the backward of two calls costs more than their forward
        long = VERY_LONG_PREFIX if queries > 4 * FEW_QUERIES else LONG_PREFIX
        return "merged" if prefix.length >= long and queries <= 64 and mask is None else "concat"
    return "merged" if prefix.length >= LONG_PREFIX and (mask is None or queries < 1024) else "concat"
