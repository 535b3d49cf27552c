"""Budgets, lines and the order of runs: nothing here trains."""

from __future__ import annotations

import comparing
import pytest
from hypothesis import given
from hypothesis import strategies as st

import foreword as fw
from foreword.compare import PRESETS, Budget, Plan, make_rows, preset_rows
from foreword.compare.budget import parse_factors
from foreword.errors import ConfigError
from foreword.methods import usual_learning_rate

FACTS = {"model": "m"}


@given(st.integers(1, 5000), st.integers(2, 6), st.floats(0.05, 0.9))
def test_trials_and_the_run_are_the_budget(steps, trials, share):
    try:
        trial, rest = Budget(steps=steps).split(trials, share)
    except ConfigError as exc:
        assert int(share * steps / trials) < 2 and "--rates 1" in str(exc)
        return
    assert trials * trial.steps + rest.steps == steps
    assert trials * trial.steps <= share * steps and trial.steps >= 2 and rest.steps >= 1


@given(st.floats(1, 1e5), st.integers(2, 6), st.floats(0.05, 0.9))
def test_seconds_are_shared_too(seconds, trials, share):
    trial, rest = Budget(seconds=seconds).split(trials, share)
    assert trials * trial.seconds + rest.seconds == pytest.approx(seconds)
    assert trials * trial.seconds == pytest.approx(share * seconds)


def test_one_rate_needs_no_trial():
    assert Budget(steps=1).split(1, 0.25) == (None, Budget(steps=1))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("200", Budget(steps=200)), ("24 steps", Budget(steps=24)), ("1 step", Budget(steps=1)),
     ("300s", Budget(seconds=300)), ("1.5m", Budget(seconds=90)), ("2h", Budget(seconds=7200))],
)  # fmt: skip
def test_budgets_in_words(text, wanted):
    assert Budget.parse(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "-3", "10 epochs", "0s", "inf s", "1e3"])
def test_what_is_no_budget(text):
    with pytest.raises(ConfigError):
        Budget.parse(text)


def test_multiples_of_the_usual_rate():
    assert parse_factors("3,0.3,1,1") == (0.3, 1.0, 3.0)
    for text in ("", "a", "0,1", "-1"):
        with pytest.raises(ConfigError):
            parse_factors(text)
    (row,) = make_rows(["prefix+memory"], [4], comparing.task())
    assert row.rates(0.5) == [pytest.approx(0.5 * usual_learning_rate(c)) for c in row.configs]
    assert [c.learning_rate for c in row.at(0.5, 7)] == row.rates(0.5) and row.at(1, 7)[0].seed == 7


def test_lines_of_methods_and_lengths():
    rows = make_rows(["prefix", "lora", "lora:2", "prompt:7", "full"], [2, 5], comparing.task())
    assert [r.label for r in rows] == ["prefix 2", "prefix 5", "lora 8", "lora 2", "prompt 7", "full"]
    assert [r.length for r in rows] == [2, 5, None, None, 7, None]
    assert rows[3].configs == (fw.LoRAConfig(rank=2, alpha=4),)
    assert rows[1].configs[0].init == comparing.task().init


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["prefiks"], "did you mean prefix"),
        (["full:3"], "full has no size"),
        (["lora:0"], "its rank"),
        ([], "no method"),
    ],
)
def test_methods_that_are_none(names, said):
    with pytest.raises(ConfigError, match=said):
        make_rows(names, [4], comparing.task())


def test_a_length_is_one_or_more():
    with pytest.raises(ConfigError, match="a length of 0"):
        make_rows(["prefix"], [0], comparing.task())


def plan(**given):
    rows = make_rows(["prefix", "full"], [4], comparing.task())
    return Plan(rows, given.pop("seeds", (0, 1)), Budget(steps=40), **given)


def done(loss):
    return {"valid_loss": loss}


def walk(made, losses):
    """All runs in the order in which they are done, with these losses of trials by row and factor."""
    finished, order = {}, []
    while (run := made.next(finished, FACTS)) is not None:
        order.append(run)
        finished[run.key(FACTS)] = done(losses.get((run.label, run.factor), 1.0))
    return order, finished


def test_rates_are_tried_with_the_first_seed_and_the_best_is_kept():
    made = plan()
    order, finished = walk(made, {("prefix 4", 0.3): 0.5, ("full", 3.0): 0.2, ("full", 1.0): 0.3})
    assert len(order) == len(made) == 2 + 2 * (3 + 2)
    kinds = [(r.kind, r.label, r.seed, r.factor) for r in order]
    assert kinds[:2] == [("base", "base model", 0, 1.0), ("prompted", "prompted", 0, 1.0)]
    assert kinds[2:6] == [("rate", "prefix 4", 0, f) for f in (0.3, 1.0, 3.0)] + [("final", "prefix 4", 0, 0.3)]
    assert kinds[-2:] == [("final", "prefix 4", 1, 0.3), ("final", "full", 1, 3.0)]
    budgets = {r.kind: r.budget for r in order}
    assert budgets["rate"] == Budget(steps=3) and budgets["final"] == Budget(steps=31)
    assert made.next(finished, FACTS) is None
    assert [r.timed for r in order if r.kind == "final"] == [True, True, False, False]


def test_a_rate_is_chosen_when_all_were_tried():
    made = plan()
    row = made.rows[0]
    trials = made.trials(row)
    finished = {trials[0].key(FACTS): done(0.1), trials[1].key(FACTS): done(None)}
    assert made.chosen(row, finished, FACTS) is None
    finished[trials[2].key(FACTS)] = done(0.05)
    assert made.chosen(row, finished, FACTS) == 3.0
    diverged = {t.key(FACTS): done(None) for t in trials}
    assert made.chosen(row, diverged, FACTS) == 0.3


def test_more_seeds_and_lines_keep_what_is_finished():
    _, finished = walk(plan(seeds=(0,)), {})
    order = [r for r in plan(seeds=(0, 1, 2)).runs(finished, FACTS) if r.key(FACTS) not in finished]
    assert [(r.kind, r.seed) for r in order] == [("final", 1), ("final", 1), ("final", 2), ("final", 2)]


def test_a_failed_run_does_not_hold_up_the_others():
    made = plan(factors=(1.0,))
    failed = [made.final(made.rows[0], 0, 1.0).key(FACTS)]
    finished = {run.key(FACTS): done(1.0) for run in made.runs({}, FACTS) if run.row is None}
    assert made.next(finished, FACTS, failed).label == "full"


def test_keys_tell_runs_apart():
    made, other = plan(), plan(share=0.5)
    keys = {
        run.key(facts)
        for facts in (FACTS, {"model": "n"})
        for run in (*made.runs({}, facts), *other.trials(made.rows[0]))
    }
    assert len(keys) == 2 * (2 + 2 * 3 + 3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_lines_of_their_own_names(name):
    rows = preset_rows(name, comparing.task(train=comparing.RECORDS * 60, words="film old"), layers=8)
    assert len(rows) > 1 and len({r.label for r in rows}) == len(rows)
    assert len({r.to_json().__repr__() for r in rows}) == len(rows)


def test_presets_say_what_they_lack():
    with pytest.raises(ConfigError, match="names none; add words:"):
        preset_rows("initialisation", comparing.task())
    with pytest.raises(ConfigError, match="trains on 50 examples"):
        preset_rows("low-data", comparing.task())
    with pytest.raises(ConfigError, match="did you mean length"):
        preset_rows("lenght", comparing.task())
    rows = preset_rows("low-data", comparing.task(train=comparing.RECORDS * 12), methods=("prefix",))
    assert [(r.label, r.examples) for r in rows] == [("prefix 20, 50 examples", 50), ("prefix 20, 100 examples", 100)]
