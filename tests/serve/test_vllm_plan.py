"""Which tokens come from a prefix and where they go, against a cache that is written out slot by slot."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from foreword.serve.vllm.plan import Planner
from foreword.serve.vllm.salt import Salt

PLACE = 7


def request(salt="", ids=(), *, more=0, scores=False):
    return SimpleNamespace(
        request_id="r", cache_salt=salt or None, prompt_token_ids=list(ids), num_tokens=len(ids) + more,
        skip_reading_prefix_cache=scores,
    )  # fmt: skip


def task(length):
    return Salt("t", "0" * 32, length)


@given(st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 4, 16]), st.integers(0, 5), st.randoms())
def test_the_slots_of_the_positions_that_are_not_cached(length, text, size, cached, random):
    planner, salt = Planner(PLACE, lambda: size), task(length)
    asked = request(str(salt), [PLACE] * length + [1] * text)
    computed = min(cached * size, (length + text - 1) // size * size)
    blocks = random.sample(range(1000), -(-(length + text) // size))
    external = planner.matched(asked, computed)
    assert external == max(length - computed, 0)
    planner.allocated(asked, blocks, external)
    loads = planner.planned({"r": text}, {"r": computed}, lambda _: blocks)
    if not external:
        assert loads == []
        return
    (load,) = loads
    where = {p: blocks[p // size] * size + p % size for p in range(length + text)}
    assert list(load.slots) == [where[p] for p in range(load.start, load.stop)] and not load.over
    assert (load.start, load.stop) == (computed, length)
    assert set(load.blocks) == {s // size for s in load.slots}
    assert planner.planned({}, {}, lambda _: []) == []


@given(st.integers(1, 50), st.integers(1, 30), st.integers(1, 20))
def test_where_scores_are_asked_for_every_placeholder_is_written_over_once(length, text, chunk):
    planner, salt = Planner(PLACE, lambda: 4), task(length)
    asked = request(str(salt), [PLACE] * length + [1] * text, scores=True)
    planner.allocated(asked, [], 0)
    blocks, done, written = list(range(100)), 0, []
    while done < length + text:
        now = min(chunk, length + text - done)
        for load in planner.planned({"r": now}, {"r": done}, lambda _: blocks):
            assert load.over
            written += range(load.start, load.stop)
            assert done <= load.start and load.stop <= done + now
        done += now
    assert written == list(range(length)) and planner.planned({"r": 1}, {"r": done}, lambda _: blocks) == []


def test_others_are_left_alone_and_bad_ones_are_reported():
    planner = Planner(PLACE, lambda: 4)
    for other in (request(ids=[1, 2]), request("their-own", [PLACE] * 5)):
        assert planner.matched(other, 0) == 0
        planner.allocated(other, [1, 2], 0)
    assert planner.planned({}, {}, lambda _: []) == []
    salt = str(task(3))
    for bad in (
        request(salt, [PLACE, PLACE, 1, 1]),  # too few placeholders
        request(salt, [PLACE] * 3),  # no text
        request("foreword:t", [PLACE] * 3 + [1]),
    ):
        assert planner.matched(bad, 0) == bad.num_tokens - 1
        planner.allocated(bad, [5, 6], bad.num_tokens - 1)
        (load,) = planner.planned({}, {}, lambda _: [])
        assert load.salt is None and load.blocks == (5, 6)
    # No text, behind a block that good requests read as well.
    planner.allocated(request(str(task(6)), [PLACE] * 6), [5, 6], 1)
    assert [x.blocks for x in planner.planned({}, {}, lambda _: [])] == [(6,)]


def test_a_preempted_request_is_loaded_again_and_a_finished_one_forgotten():
    planner, salt = Planner(PLACE, lambda: 4), task(6)
    asked = request(str(salt), [PLACE] * 6 + [1], more=9)
    for blocks in ([0, 1, 2, 3], [9, 8, 7, 6]):
        planner.allocated(asked, blocks, planner.matched(asked, 0))
        (load,) = planner.planned({}, {}, lambda _: [])
        assert load.slots[0] == blocks[0] * 4 and load.slots[-1] == blocks[1] * 4 + 1
    planner.allocated(request(str(salt), [PLACE] * 6 + [1], scores=True), [0, 1], 0)
    planner.finished("r")
    assert planner.planned({"r": 7}, {"r": 0}, lambda _: [0, 1]) == []
