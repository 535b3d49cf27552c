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
    from foreword.attention import SitePrefix

Path = Literal["merged", "concat", "step"]

FEW_QUERIES = 8
LONG_PREFIX = 512
LONG_TEXT = 768  # causal without a mask


def cheapest(query: Tensor, key: Tensor, prefix: SitePrefix, mask: Any) -> Path:
    """The path that is fastest for these sizes (measured on CPUs)."""
    batch, _, queries, _ = query.shape
    if queries <= 2 * FEW_QUERIES:  # a step of generation, or a short prompt
        copied = batch * (key.shape[2] + prefix.length)
        if queries > FEW_QUERIES or (queries > 1 and mask is None):
            return "merged" if copied >= 1200 + 80 * queries else "concat"
        return "step" if copied + 64 * batch >= 800 + 50 * queries else "concat"
    if prefix.length >= LONG_PREFIX:
        return "merged" if mask is None or queries < 1024 else "concat"
    return "merged" if mask is None and queries >= LONG_TEXT else "concat"
