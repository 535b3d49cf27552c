"""Rows of keys and values that join, grow and leave: each row is what it would be alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from foreword.serve.cache import RowCache

HEADS, KEY, VALUE, LAYERS = 2, 3, 5, 2


def states(rows, columns, generator):
    return tuple(torch.randn(rows, HEADS, columns, d, generator=generator) for d in (KEY, VALUE))


def held(cache, row):
    """A row's keys and values as the cache has them."""
    start = cache.end - cache.lengths[row]
    return [(layer.keys[row, :, start : cache.end], layer.values[row, :, start : cache.end]) for layer in cache.layers]


@settings(max_examples=60)
@given(st.lists(st.one_of(
    st.tuples(st.just("join"), st.lists(st.integers(1, 90), min_size=1, max_size=3)),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.integers(1, 70)),
), min_size=1, max_size=14))  # fmt: skip
def test_rows_keep_their_own(events):
    generator, cache, want = torch.Generator().manual_seed(0), RowCache(), []
    for what, argument in events:
        if what == "join":
            source, width = DynamicCache(), max(argument)
            for layer in range(LAYERS):
                source.update(*states(len(argument), width, generator), layer)
            picks = [len(argument) - 1, *range(len(argument))]  # one row twice
            lengths = [argument[p] for p in picks]
            cache.join(source, picks, lengths)
            want += [
                [(s.keys[p, :, width - n :], s.values[p, :, width - n :]) for s in source.layers]
                for p, n in zip(picks, lengths, strict=True)
            ]
        elif what == "leave" and want:
            row = argument % len(want)
            cache.leave(row)
            want[row] = want[-1]
            want.pop()
        elif what == "step" and want:
            for _ in range(argument):
                cache.prepare()
                new = [states(len(want), 1, generator) for _ in range(LAYERS)]
                halves = [(0, len(want))] if len(want) < 2 else [(0, 1), (1, len(want))]
                if argument % 2:  # a pass that failed in its second layer is run again, in parts
                    with cache.passing(0, len(want)):
                        cache.layers[0].update(*[torch.full_like(s, torch.nan) for s in new[0]])
                    parts = halves
                else:
                    parts = [(0, len(want))]
                for first, stop in parts:
                    with cache.passing(first, stop) as (mask, positions):
                        seen = [layer.update(k[first:stop], v[first:stop])
                                for layer, (k, v) in zip(cache.layers, new, strict=True)]  # fmt: skip
                        width = max(cache.lengths[first:stop]) + 1
                        assert mask.shape == (stop - first, width) and cache.get_seq_length() == width - 1
                        assert positions[:, 0].tolist() == cache.lengths[first:stop]
                        for (keys, values), n in ((s, i) for s in seen for i in range(stop - first)):
                            assert keys.shape[2] == values.shape[2] == width and keys.isfinite().all()
                            assert mask[n].sum() == cache.lengths[first + n] + 1
                            assert not keys[n, :, ~mask[n]].any() and not values[n, :, ~mask[n]].any()
                cache.advance()
                for row, mine in enumerate(want):
                    want[row] = [(torch.cat([k, a[row]], 1), torch.cat([v, b[row]], 1))
                                 for (k, v), (a, b) in zip(mine, new, strict=True)]  # fmt: skip
        assert len(cache) == len(want) and cache.lengths == [w[0][0].shape[1] for w in want]
        assert cache.padding == len(want) * cache.width - sum(cache.lengths)
        for row, mine in enumerate(want):
            for (k, v), (a, b) in zip(held(cache, row), mine, strict=True):
                assert torch.equal(k, a) and torch.equal(v, b)
        columns = cache.places * cache.capacity
        assert cache.nbytes == 4 * columns * HEADS * (KEY + VALUE) * (LAYERS if cache.layers else 0)


def test_places_that_are_not_needed_any_more_go():
    """What is allocated follows what is written: one long row doesn't keep room for those that have left."""
    generator, cache, source = torch.Generator().manual_seed(0), RowCache(), DynamicCache()
    source.update(*states(16, 8, generator), 0)
    cache.join(source, range(16), [8] * 16)
    for _ in range(15):
        cache.leave(0)
    for _ in range(300):
        cache.prepare()
        with cache.passing(0, 1):
            cache.layers[0].update(*states(1, 1, generator))
        cache.advance()
    assert cache.lengths == [308] and cache.places == 1 and cache.capacity <= 308 + max(64, 308 // 4)
