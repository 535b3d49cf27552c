"""Families of tiny tasks for meta-learning: what texts of one task have in common, and what all tasks have."""

from __future__ import annotations

import random

from foreword.data import EncodedDataset, EncodeStats


def dataset(rows):
    """Token ids, all but the first supervised."""
    labels = [[-100, *ids[1:]] for ids in rows]
    tokens = sum(map(len, rows))
    stats = EncodeStats(len(rows), 0, 0, tokens, tokens - len(rows), max(map(len, rows), default=0))
    return EncodedDataset(rows, labels, stats)


def family(tasks=4, examples=12, length=6, seed=0, names="abcdefghijklmnop"):
    """Each task writes with three letters of its own, out of the ten that all tasks share."""
    chance = random.Random(seed)
    found = {}
    for name in names[:tasks]:
        letters = chance.sample(range(10, 20), 3)
        found[name] = dataset([chance.choices(letters, k=length) for _ in range(examples)])
    return found
