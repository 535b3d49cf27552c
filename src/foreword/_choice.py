"""Which path an attention call takes, merging or concatenation: by size, as benchmarks/attention.py measured.

Merging pays for its second kernel call and the join. It saves the copy of the keys and values, which is most of the
work when few queries meet a large cache; all rows' copies of a long prefix; and half of the scores where the text is
long and causal, because the text keeps its causal kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from foreword.attention import SitePrefix

FEW_QUERIES = 16
LONG_PREFIX = 512
LONG_TEXT = 768  # causal without a mask


def merging_pays(query: Tensor, key: Tensor, prefix: SitePrefix, mask: Any) -> bool:
    """Whether two kernel calls beat one call over copied keys and values (measured on CPUs)."""
    queries = query.shape[2]
    if queries <= FEW_QUERIES:  # a step of generation, or a short prompt
        copied = key.shape[0] * (key.shape[2] + prefix.length)
        return copied >= 1200 + 80 * queries
    if prefix.length >= LONG_PREFIX:
        return mask is None or queries < 1024
    return mask is None and queries >= LONG_TEXT
