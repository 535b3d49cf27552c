"""TaskMixture: what is drawn how often, in which order, and that all of it follows from seed and epoch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import foreword as fw
from foreword.data import encode, read_examples
from foreword.data.mixture import parse_sampling


def rows(n):
    return [{"input_ids": [i], "labels": [i]} for i in range(n)]


def mixture(*sizes, **options):
    return fw.TaskMixture({f"t{i}": rows(n) for i, n in enumerate(sizes)}, **options)


def drawn(made, seed, epoch):
    """(task, example) of each draw."""
    return [(made[i]["task"], made[i]["input_ids"][0]) for i in made.order(seed, epoch)]


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    sampling=st.sampled_from(["size", "uniform", "temperature"]),
    temperature=st.floats(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_draws_are_the_shares_of_the_formula(sizes, sampling, temperature, seed):
    made = mixture(*sizes, sampling=sampling, temperature=temperature)
    power = {"size": 1.0, "uniform": 0.0, "temperature": 1 / temperature}[sampling]
    total, weights = sum(sizes), [n**power for n in sizes]
    assert len(made) == total == sum(made.draws.values()) and min(made.draws.values()) >= 1
    for n, weight in zip(made.draws.values(), weights, strict=True):
        assert abs(n - total * weight / math.fsum(weights)) < 1 + 1e-6
    for epoch in (0, 3):
        assert Counter(task for task, _ in drawn(made, seed, epoch)) == made.draws


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), uniform=st.booleans(), seed=st.integers(0, 1000))
def test_no_example_comes_twice_before_all_came_once(sizes, uniform, seed):
    """Over several epochs too: a task's examples are dealt like a pack of cards."""
    made = mixture(*sizes, sampling="uniform" if uniform else "size")
    assert sorted(made.order(seed, 0)) == list(range(len(made))) or uniform
    for epochs in (1, 2, 5):
        times = Counter(d for epoch in range(epochs) for d in drawn(made, seed, epoch))
        for number, n in enumerate(sizes):
            own = [times[f"t{number}", i] for i in range(n)]
            assert max(own) - min(own) <= 1 and sum(own) == epochs * made.draws[f"t{number}"]


def test_the_order_follows_from_seed_and_epoch_alone():
    one, other = mixture(20, 7), mixture(20, 7)
    assert one.order(5, 2) == other.order(5, 2)  # without having drawn epochs 0 and 1
    assert len({tuple(one.order(seed, epoch)) for seed in (0, 5) for epoch in (0, 1, 2)}) == 6
    tasks = [task for task, _ in drawn(one, 0, 0)]
    assert tasks != sorted(tasks) and tasks != sorted(tasks, reverse=True)


def test_a_high_temperature_draws_alike_and_one_by_size():
    sizes = (1000, 10)
    by_size, flat = mixture(*sizes, sampling="temperature", temperature=1), mixture(*sizes, sampling="uniform")
    assert by_size.draws == mixture(*sizes).draws == {"t0": 1000, "t1": 10}
    assert mixture(*sizes, sampling="temperature", temperature=1e9).draws == flat.draws == {"t0": 505, "t1": 505}
    assert mixture(*sizes, sampling="temperature").draws == {"t0": 918, "t1": 92}  # 10 to 1, as their roots


def test_examples_are_the_data_sets_own_with_their_task(tokenizer):
    data = encode(read_examples([{"text": "A film."}, {"text": "A plain place."}]), tokenizer, max_length=20)
    made = fw.TaskMixture({"film": data, "other": rows(3)})
    assert [made[i] for i in range(2)] == [{**data[i], "task": "film"} for i in range(2)]
    assert [made[i]["input_ids"] for i in range(2, 5)] == [[0], [1], [2]] and made[4]["task"] == "other"
    assert made.parts["film"][1] == made[1] and made.tasks == ["film", "other"] and made.sizes["other"] == 3
    assert "film 2 (40% of the draws)" in made.describe()
    with pytest.raises(IndexError):
        made[5]


def test_refusals():
    with pytest.raises(fw.ConfigError, match="needs a data set for each task"):
        fw.TaskMixture({})
    with pytest.raises(fw.DataError, match="'t1' has no examples; give it some, or leave it out"):
        mixture(3, 0)
    with pytest.raises(fw.ConfigError, match='expected "size", "uniform" or "temperature"'):
        mixture(3, sampling="sizes")
    for temperature in (0.5, math.inf, math.nan):
        with pytest.raises(fw.ConfigError, match=r"expected 1 \(by size\) or more"):
            mixture(3, temperature=temperature)


def test_samplings_are_read_from_a_word():
    assert parse_sampling("uniform") == {"sampling": "uniform"}
    assert parse_sampling("temperature:3.5") == {"sampling": "temperature", "temperature": 3.5}
    for bad in ("", "sized", "size:2", "temperature:", "temperature:x", "temperature:-1"):
        with pytest.raises(fw.ConfigError, match="expected size, uniform or temperature:2"):
            parse_sampling(bad)
