"""Budget: tasks in tiers, who makes room for whom, and that nothing is ever overdrawn, lost or changed unasked."""

from __future__ import annotations

import pytest
import torch
from budgets import answer, tiers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import SITES, TOKEN, make

import foreword as fw
import zoo
from foreword.serve.budget import parse_bytes
from foreword.serve.library import Library
from foreword.serve.tiers.forms import plain
from foreword.storage import Storage

# ---------------------------------------------------------------- sizes, known before


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(1, 70)), min_size=1, max_size=4),
    st.sampled_from(["int8", "int4", "int8:token", "int4:channel"]),
    st.sampled_from(["int8", "int4", "int4:channel"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 9),
)
@settings(deadline=None, max_examples=60)
def test_sizes_are_known_before_anything_is_made(shapes, keys, values, dtype, most):
    site = SITES[0]
    sites = [
        fw.Site(**{**site.to_json(), "name": f"s{i}", "kv_heads": g, "heads": g, "key_dim": d, "value_dim": d + 1})
        for i, (g, _, d) in enumerate(shapes)
    ]
    made = fw.Prefix(
        {f"s{i}": torch.randn(g, n, d).to(dtype) for i, (g, n, d) in enumerate(shapes)},
        {f"s{i}": torch.randn(g, n, d + 1).to(dtype) for i, (g, n, d) in enumerate(shapes)},
        sites,
        log_weights={"s0": torch.zeros(shapes[0][1], dtype=dtype)},
        bias={"s0": torch.zeros(shapes[0][0], dtype=dtype)},
    )
    form, storage = plain(made), Storage.of(keys, values)
    assert form.size(None, dtype) == form.nbytes == made.nbytes
    packed = form.packed(storage)
    assert form.size(storage, dtype) == packed.size(storage, dtype) == packed.nbytes
    assert packed.size(None, dtype) == form.nbytes
    if made.longest:
        cut = plain(made.slice(0, most))
        assert form.size(None, dtype, most=most) == cut.nbytes
        assert form.size(storage, dtype, most=most) == cut.packed(storage).nbytes


def test_what_a_library_says_before_is_what_it_holds(library):
    held, prefix = library(), make(40)
    held.add("a", prefix)
    assert held.bytes_of(prefix) == 40 * TOKEN == held.usage.tiers["device"].nbytes
    few = library(14, when_full="compress")
    few.add("a", prefix)
    assert few.bytes_of(prefix, storage="int8") == few.usage.tiers["device"].nbytes == few.usage.tasks["a"].nbytes
    assert few.usage.tasks["a"].storage == "int8"


@pytest.mark.parametrize(
    ("text", "nbytes"), [("500000", 500000), ("200MB", 200 * 10**6), ("1.5 GiB", 3 << 29), ("2k", 2000), ("7b", 7)]
)
def test_bytes_as_people_write_them(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "-1", "1.5.2", "3TB", "0x10"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(fw.ConfigError, match="no number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_bytes": 0}, "1 or more"),
        ({"cpu_bytes": -1}, "0 or more"),
        ({"device_bytes": True}, "whole number"),
        ({"when_full": "shout"}, "'shout' is none of these"),
        ({"when_full": ()}, "empty"),
        ({"when_full": "move,move"}, "twice"),
        ({"when_full": "refuse,move"}, "'move' after 'refuse'"),
        ({"when_full": "queue,move,refuse"}, "'move' after 'queue'"),
        ({"storage": "plain"}, "few bits"),
        ({"storage": "int3"}, "int3"),
        ({"keep": 1.0}, "below 1"),
    ],
)
def test_budgets_that_make_no_sense(options, message):
    with pytest.raises(fw.ConfigError, match=message):
        fw.Budget(**options)


# ---------------------------------------------------------------- moves


def test_tasks_move_down_and_come_back_bit_equal(library):
    held = library(8, cpu=6)
    before = {}
    for seed, name in enumerate("abcdef"):
        held.add(name, make(4, seed))
        before[name] = answer(held, name)
    assert sum(u.device_bytes > 0 for u in held.usage.tasks.values()) == 2
    assert set(tiers(held).values()) == {"device", "cpu", "file"}
    for name in "abcdeffedcbabdf":
        assert torch.equal(answer(held, name), before[name])
        use = held.usage.tiers
        assert use["device"].nbytes <= 8 * TOKEN and use["cpu"].nbytes <= 6 * TOKEN
    assert held.usage.counts.evictions and held.usage.counts.moves_up and not held.usage.counts.refusals


def test_a_newcomer_disturbs_nobody_of_its_rank_and_the_lowest_go_first(library):
    held = library(8)
    held.add("low", make(4, 0), priority=-1)
    held.add("plain", make(4, 1))
    held.add("new", make(4, 2))
    assert tiers(held) == {"low": "cpu", "plain": "device", "new": "device"}
    held.add("newer", make(4, 3))
    assert tiers(held)["newer"] == "cpu"
    answer(held, "plain")
    answer(held, "newer")  # it is used: whoever was used least recently goes
    assert tiers(held) == {"low": "cpu", "plain": "device", "new": "cpu", "newer": "device"}


def test_high_ranks_are_not_moved_for_low_ones(library):
    held = library(4)
    held.add("high", make(4, 0), priority=5)
    held.add("low", make(4, 1))
    with pytest.raises(fw.BudgetError, match=r"above priority 0 \d") as caught, held.use("low"):
        pass
    assert (caught.value.needed, caught.value.free, caught.value.limit) == (4 * TOKEN, 0, 4 * TOKEN)
    assert tiers(held) == {"high": "device", "low": "cpu"} and held.usage.counts.refusals == 1
    held.remove("high")
    answer(held, "low")


def test_pinned_ones_stay(library):
    held = library(8)
    held.add("fixed", make(4, 0), pinned=True)
    for seed, name in enumerate("abc"):
        held.add(name, make(4, seed), priority=9)
        answer(held, name)
    assert tiers(held)["fixed"] == "device" and held.usage.tasks["fixed"].pinned
    with pytest.raises(fw.BudgetError, match="pinned ones"):
        held.add("wide", make(5, 9), priority=9, pinned=True)
    assert "wide" not in held
    held.unpin("fixed")
    held.add("wide", make(5, 9), priority=9, pinned=True)
    assert tiers(held)["wide"] == "device" and tiers(held)["fixed"] != "device"
    with pytest.raises(fw.BudgetError, match="pinned ones"):
        held.pin("fixed")
    assert not held.usage.tasks["fixed"].pinned


def test_without_moves_what_finds_no_room_is_refused_and_the_rest_stays(library):
    held = library(6, when_full="refuse")
    held.add("a", make(4, 0))
    want = answer(held, "a")
    with pytest.raises(fw.BudgetError, match=r"task 'b' needs [\d,]+ bytes on the device; [\d,]+ of [\d,]+ are free"):
        held.add("b", make(4, 1))
    assert held.names == ["a"]
    held.add("a", make(5, 3))  # the room of what it replaces is its own
    assert not torch.equal(answer(held, "a"), want)
    with pytest.raises(fw.BudgetError):
        held.add("a", make(7, 3))
    assert held.usage.tasks["a"].virtual_tokens == 5 and held.usage.tiers["device"].nbytes == 5 * TOKEN


def test_few_bits_take_less_and_answers_stay_the_same_after_the_first_time(library):
    held = library(45, when_full="compress,refuse")
    before = {}
    for seed, name in enumerate(("a", "b", "c")):
        held.add(name, make(20, seed))
    for name in ("a", "b", "c"):
        before[name] = answer(held, name)
    assert held.usage.counts.compressions >= 2
    for name in "abcba":
        assert torch.equal(answer(held, name), before[name])
        assert held.usage.tiers["device"].nbytes <= 45 * TOKEN
    exact = library()
    for seed, name in enumerate(("a", "b", "c")):
        exact.add(name, make(20, seed))
        torch.testing.assert_close(answer(exact, name), before[name], atol=0.05, rtol=0.05)


def test_what_came_from_few_bits_goes_back_without_loss(library, tmp_path):
    make(20, 1).save(tmp_path / "p", storage="int4")
    loaded = fw.Prefix.load(tmp_path / "p")
    free, tight = library(), library(36, when_full="compress")
    for held in (free, tight):
        held.add("a", loaded)
        held.add("b", make(20, 2))
    answer(tight, "b")
    assert tight.usage.tasks["a"].storage == "int4" and tight.usage.tasks["b"].storage == "int8"
    assert torch.equal(answer(tight, "a"), answer(free, "a"))


def test_fewer_tokens_are_those_with_the_largest_shares(library):
    held, prefix = library(6, when_full="shorten", keep=0.5), make(8, 4)
    shares = held.measure_shares(prefix, [zoo.ids(1, 6, s)[0].tolist() for s in range(3)])
    found = torch.zeros(SITES[0].kv_heads, 8)
    for seed in range(3):
        tuning = fw.attach(zoo.build("llama"), prefix)
        from foreword.shares import measured_shares

        with measured_shares(tuning.model, by_token=True) as got, torch.no_grad():
            tuning.model(input_ids=zoo.ids(1, 6, seed))
        found += got[SITES[0].name].sum((0, 2)).unflatten(0, (SITES[0].kv_heads, -1)).mean(1) / 18
    torch.testing.assert_close(shares[SITES[0].name], found, atol=1e-5, rtol=1e-4)
    held.add("a", prefix, shares=shares)
    use = held.usage.tasks["a"]
    assert use.virtual_tokens == 4 and held.usage.counts.shortenings == 1
    from foreword.compression import prune

    assert held["a"] == prune(prefix, shares, 4, uniform=True)
    with pytest.raises(fw.BudgetError):  # without shares there is nothing to go by
        held.add("b", make(8, 5))


def test_a_model_in_half_precision(library):
    model = zoo.build("llama").bfloat16()
    held = Library(model, budget=fw.Budget(4 * TOKEN // 2, TOKEN, "move"))
    for seed in range(3):
        held.add(f"t{seed}", make(4, seed, zoo.build("llama")))
    before = [answer(held, f"t{s}") for s in range(3)]
    assert all(torch.equal(answer(held, f"t{s}"), before[s]) for s in range(3))
    assert held.usage.tiers["device"].nbytes == 4 * TOKEN // 2


@pytest.mark.parametrize("action", ["compress", "shorten"])
def test_whoever_ranks_lowest_is_made_small_first(library, action):
    """A newcomer only if it is the lowest, or the lowest one's smaller size is not enough."""

    def add(held, name, seed, priority):
        prefix = make(20, seed)
        shares = {n: torch.rand(2, 20, generator=torch.Generator().manual_seed(seed)) for n in prefix.keys}
        held.add(name, prefix, priority=priority, **({"shares": shares} if action == "shorten" else {}))

    def small(held):
        return {n for n, use in held.usage.tasks.items() if use.nbytes < 20 * TOKEN}

    for priorities, want in (((-1, 5), {"old"}), ((5, -1), {"new"}), ((0, 0), {"new"})):
        held = library(35, when_full=f"{action},refuse")
        add(held, "old", 0, priorities[0])
        add(held, "new", 1, priorities[1])
        assert small(held) == want, priorities
        assert held.usage.tiers["device"].nbytes <= 35 * TOKEN
