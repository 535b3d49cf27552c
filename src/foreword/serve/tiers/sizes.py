"""Exact bytes, from shapes alone: known before anything is copied, packed or read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from foreword import _packing
from foreword.storage import Packing

if TYPE_CHECKING:
    from foreword.prefix import Prefix
    from foreword.sites import Site


def packed_bytes(shapes: Iterable[tuple[int, int, int]], packing: Packing) -> int:
    """Of all keys or all values in few bits: the codes, and a start and a step in float16 for each run.

    Args:
        shapes: heads, tokens, dimensions of each site.
    """
    assert packing.bits is not None
    numbers = runs = 0
    for shape in shapes:
        rows, each = _packing._runs(shape, packing)
        numbers, runs = numbers + math.prod(shape), runs + rows * each
    return (-(-numbers // 2) if packing.bits == 4 else numbers) + 4 * runs


def reader_bytes(prefix: Prefix, sites: Iterable[Site], dtype: torch.dtype) -> int:
    """What a row of a mixed batch may hold of a prefix, at most: a copy, padded to the longest of the batch's.

    Of a batch of several such rows each counts as the largest of them.
    """
    sites = list(sites)
    tokens = prefix.longest * sum(s.parameters(1) * dtype.itemsize + 5 for s in sites)  # and which of them count
    own = {s.name: s for s in prefix.sites}
    memory = sum(own[n].heads * own[n].key_dim * own[n].value_dim for n in prefix.memory)
    up = sum(t.numel() for t in prefix.memory_up.values())
    weights = sum(s.heads * (s.key_dim + 3) for s in sites)  # biases, gates, readings
    return tokens + (2 * (memory + up) + weights) * dtype.itemsize
