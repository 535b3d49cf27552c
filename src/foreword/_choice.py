"""Which path an attention call takes: merging, or concatenation. By size, as benchmarks/attention.py measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from foreword.attention import SitePrefix


def merging_pays(query: Tensor, key: Tensor, prefix: SitePrefix, mask: Any) -> bool:
    """Whether two kernel calls beat one call over copied keys and values."""
    return query.shape[2] >= 512
