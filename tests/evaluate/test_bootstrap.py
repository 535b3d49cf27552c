"""Intervals and paired tests against theory, sacrebleu and hand-made data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import ConfigError, DataError
from foreword.evaluate._counts import fixed, mean, share
from foreword.evaluate.bootstrap import interval, paired
from foreword.evaluate.metrics import compare, count, score

numbers = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def test_the_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = interval(mean(values.tolist()), 4000, 1)
    error = 100 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(100 * values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(100 * values.mean() + 1.96 * error, abs=0.1 * error)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    rng = np.random.default_rng(3)
    held = 0
    for i in range(200):
        counts = share(rng.binomial(10, 0.3, 60).tolist(), [10] * 60)
        low, high = interval(counts, 300, i)
        held += low <= 30 <= high
    assert 180 <= held <= 198  # the binomial's own range at 95 %, and the percentile method's small bias


@given(numbers, st.integers(0, 99))
def test_the_same_seed_gives_the_same_interval_around_the_value(values, seed):
    counts = mean(values)
    first = interval(counts, 50, seed)
    assert first == interval(counts, 50, seed)
    assert 100 * min(values) - 1e-9 <= first[0] <= first[1] <= 100 * max(values) + 1e-9


def test_no_interval_where_none_is_asked_for_or_none_makes_sense():
    assert interval(mean([0.1, 0.9]), 0, 0) is None
    assert interval(fixed(3.0, 2), 100, 0) is None
    found = score(["a b", "b c"], metrics=["distinct-1", "self-bleu"], intervals=50)
    assert all(s.low is None and s.high is None for s in found.values())


@given(numbers)
def test_a_run_against_itself_differs_by_nothing(values):
    found = paired(mean(values), mean(values), 60, 0)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=20), st.integers(0, 9))
def test_two_runs_change_places(pairs, seed):
    one, other = (mean([p[i] for p in pairs]) for i in (0, 1))
    there, back = paired(one, other, 40, seed), paired(other, one, 40, seed)
    assert there.difference == pytest.approx(-back.difference) and there.p == back.p
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))


def test_pairs_count_not_only_means():
    """The same difference of means: sure where every example is a little better, unsure where it is a few."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 1, 80)
    little = paired(mean((hard + 0.02).tolist()), mean(hard.tolist()), 500, 0)
    few = hard.copy()
    few[:4] += 0.4
    lucky = paired(mean(few.tolist()), mean(hard.tolist()), 500, 0)
    assert little.difference == pytest.approx(2) and lucky.difference == pytest.approx(2)
    assert little.p < 0.01 < lucky.p and little.low == pytest.approx(2) and lucky.low < 1.0


def test_the_p_value_is_sacrebleus():
    """Their draws are of another generator, so the two agree within the error of 2,000 draws."""
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    rng = np.random.default_rng(5)
    words = [f"w{i}" for i in range(12)]
    references = [" ".join(rng.choice(words, 10)) for _ in range(80)]

    def system(share_right):
        return [" ".join(w if rng.random() < share_right else rng.choice(words) for w in r.split()) for r in references]

    for other in (0.72, 0.78):
        one, two = system(0.7), system(other)
        test = PairedTest([("two", two), ("one", one)], {"BLEU": BLEU()}, [references], "bs", n_samples=2000)
        theirs = test()[1]["BLEU"][1].p_value
        counted = [count(t, [[r] for r in references], metrics=["bleu"])["bleu"] for t in (one, two)]
        ours = paired(*counted, 2000, 0).p
        assert ours == pytest.approx(theirs, abs=4 * math.sqrt(max(theirs, 0.002) * (1 - theirs) / 2000) + 0.002)


def test_compare_goes_metric_by_metric():
    references = [["a b c"], ["d e f"], ["g h i"]]
    one = count(["a b c", "d e f", "x"], references, metrics=["exact-match", "distinct-1"])
    other = count(["a b c", "x", "x"], references, metrics=["exact-match", "distinct-1"])
    found = compare(one, other, resamples=200)
    assert found["exact-match"].difference == pytest.approx(100 / 3) and 0 < found["exact-match"].p <= 1
    assert found["distinct-1"].p is None and found["distinct-1"].difference == pytest.approx(100 - 80)


def test_refusals():
    with pytest.raises(DataError, match="2 and 1 examples"):
        paired(mean([0, 1]), mean([0]), 10, 0)
    with pytest.raises(ConfigError, match="resamples=0"):
        paired(mean([0, 1]), mean([0, 1]), 0, 0)
    with pytest.raises(ConfigError, match="intervals=-1"):
        score(["a"], [["a"]], metrics=["exact-match"], intervals=-1)
