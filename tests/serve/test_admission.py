"""Who is next: the order, room that is kept, prompts that are read together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import foreword as fw
from foreword.serve.admission import Limits, next_group
from foreword.serve.request import Request, Sampling


def request(length, tokens=4, n=1):
    return Request([3] * length, Sampling(max_tokens=tokens, n=n), None, lambda what: None)


_waiting = st.lists(st.builds(request, st.integers(1, 300), st.integers(1, 50), st.integers(1, 4)), max_size=12)


@given(_waiting, st.integers(0, 12), st.integers(0, 2000), st.integers(1, 600))
def test_a_group_has_room_and_little_padding_and_passes_nobody_over(waiting, rows, columns, step_tokens):
    group = next_group(waiting, rows, columns, step_tokens)
    assert sum(r.sampling.n for r in group) <= rows and sum(r.columns for r in group) <= columns
    assert bool(group) == bool(waiting and waiting[0].sampling.n <= rows and waiting[0].columns <= columns)
    if len(group) > 1:
        lengths = [len(r.prompt) for r in group]
        whole = len(lengths) * max(lengths)
        assert whole <= step_tokens and whole - sum(lengths) <= max(whole // 4, 64)
    if group:  # everybody up to the last of the group could begin as well: room for them is left
        up_to = waiting[: waiting.index(group[-1]) + 1]
        assert [r for r in up_to if r in group] == group and group[0] is waiting[0]
        assert sum(r.sampling.n for r in up_to) <= rows and sum(r.columns for r in up_to) <= columns


def test_prompts_of_like_lengths_are_read_together():
    waiting = [request(10), request(200), request(12), request(190), request(9)]
    assert [len(r.prompt) for r in next_group(waiting, 8, 10_000, 512)] == [10, 12, 9]
    assert [len(r.prompt) for r in next_group(waiting[1:], 8, 10_000, 512)] == [200, 190]
    assert [len(r.prompt) for r in next_group(waiting, 3, 10_000, 512)] == [10, 12]  # the third row is the second's
    assert [len(r.prompt) for r in next_group([request(900), request(900)], 8, 10_000, 512)] == [900]


@pytest.mark.parametrize("name", ["rows", "queue", "length", "columns", "step_tokens"])
def test_limits_are_positive(name):
    with pytest.raises(fw.ConfigError, match=f"{name}=0; expected 1 or more"):
        Limits(**{name: 0})
