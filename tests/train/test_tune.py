"""Searches: the same by seed, the default first, bad trials survived, nothing lost to a kill, bad input refused."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import searching
import tiny
import torch
from searching import BASE, SPACE, search, seen

import foreword as fw
import zoo
from foreword.data import Collator
from foreword.train._study import JOURNAL
from foreword.train._trial import Runner
from foreword.train.progress import StopOnSignal
from foreword.train.space import Budget, SearchSpace
from foreword.train.tune_report import compare

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search of nine trials, and where it is."""
    out = tmp_path_factory.mktemp("tune") / "search"
    return search(out, trials=9), out


# ---------------------------------------------------------------- what a search does


def test_a_search_leaves_its_trials_its_best_and_a_picture(found):
    result, out = found
    assert {p.name for p in out.iterdir()} == {JOURNAL, ".lock", "trials.json", "best.json", "tune.png"}
    assert (out / "tune.png").read_bytes().startswith(PNG)
    record = json.loads((out / "trials.json").read_text())
    assert [t["number"] for t in record["trials"]] == list(range(9)) and record["search"]["steps"] == 6
    complete = [t for t in result.trials if t.outcome == "complete"]
    assert result.best.loss == min(t.loss for t in complete) and record["best"] == result.best.number
    config = fw.PrefixConfig(**json.loads((out / "best.json").read_text()))
    assert config == result.config and config.learning_rate > 0 and config.hidden == 8
    assert result.best.default is False and result.comparison.gain > 0
    default = result.trials[0]
    assert result.comparison.gain == pytest.approx(default.loss - result.best.loss, abs=1e-5)
    assert f"trial {result.best.number} is the best" in result.verdict
    assert ("not a clear" in result.verdict) is not result.comparison.clear


def test_the_default_configuration_is_the_first_trial(found, tmp_path):
    first = found[0].trials[0]
    usual = {**BASE.to_json(), "learning_rate": 2e-2}
    assert first.default and first.config == usual and [t.default for t in found[0].trials].count(True) == 1
    outside = SearchSpace(lengths=(2,), reparams=("low-rank",), learning_rates=(1e-3, 2e-3), base=BASE)
    result = search(tmp_path / "a", outside, trials=3)
    assert result.trials[0].config == usual and result.trials[0].loss == first.loss
    for trial in result.trials[1:]:
        assert (trial.config["length"], trial.config["reparam"]) == (2, "low-rank")
        assert 1e-3 <= trial.config["learning_rate"] <= 2e-3


def test_the_seed_decides(found, tmp_path):
    assert seen(search(tmp_path / "a", trials=5).trials) == seen(found[0].trials)[:5]
    assert seen(search(tmp_path / "b", trials=5, seed=1).trials)[1:] != seen(found[0].trials)[1:5]


def test_trials_that_fall_behind_are_stopped_and_recorded(found, tmp_path):
    result, _ = found
    pruned = [t for t in result.trials if t.outcome == "pruned"]
    assert pruned and all(2 <= len(t.curve) < 5 and t.loss == t.curve[-1][1] for t in pruned)
    for trial in pruned:
        step, loss = trial.curve[-1]
        before = [dict(t.curve)[step] for t in result.trials[: trial.number] if t.outcome == "complete"]
        assert len(before) >= 3 and loss > statistics.median(before)
    assert all(t.curve[-1][0] == 6 for t in result.trials if t.outcome == "complete")
    whole = search(tmp_path / "a", trials=pruned[0].number + 1, prune=False)
    assert {t.outcome for t in whole.trials} == {"complete"}
    assert whole.trials[pruned[0].number].config == pruned[0].config


def test_the_model_comes_back_untouched(tmp_path):
    model = zoo.build("llama")
    model.model.layers[0].train()
    before, logits = tiny.base_weights(model), zoo.logits(model, input_ids=zoo.ids())
    search(tmp_path / "a", trials=3, model=model)
    assert fw.tuning.tuning_of(model) is None and not model.training and model.model.layers[0].training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    tiny.assert_base_unchanged(model, before)
    assert torch.equal(zoo.logits(model, input_ids=zoo.ids()), logits)


def test_a_diverged_trial_is_a_bad_one_and_not_the_end(tmp_path):
    space = SearchSpace(lengths=(4,), inits=("random",), reparams=("mlp",), learning_rates=(1e30, 1e32), base=BASE)
    result = search(tmp_path / "a", space, trials=4)
    assert [t.outcome for t in result.trials] == ["complete", "diverged", "diverged", "diverged"]
    assert all("nan" in t.message or "inf" in t.message or "times the usual" in t.message for t in result.trials[1:])
    assert result.best.number == 0 and "no trial was better than the default" in result.verdict
    assert all(t["loss"] is None or math.isfinite(t["loss"])
               for t in json.loads((tmp_path / "a" / "trials.json").read_text())["trials"])  # fmt: skip
    base = fw.PrefixConfig(length=4, init="random", reparam="mlp", hidden=8, learning_rate=1e32)
    wild = SearchSpace(lengths=(4,), inits=("random",), reparams=("direct",), base=base)
    result = search(tmp_path / "b", wild, trials=2)
    assert result.trials[0].outcome == "diverged" and result.trials[0].default and result.comparison is None
    assert "the default configuration was diverged" in result.verdict and result.best.number == 1


def test_only_points_that_can_be_trained_are_drawn(tmp_path):
    text = "The film is a lovely old confection"  # 8 tokens or so, far below 40
    space = SearchSpace(lengths=(1, 2, 40), inits=(text, "words:good film", "random"), base=BASE)
    good, bad = space.points(zoo.build("llama"), zoo.tokenizer())
    assert {p.length for p in good if p.init == text} == {1, 2} and {p.init for p in bad} == {text}
    assert {p.length for p in good if p.init != text} == {1, 2, 40}
    result = search(tmp_path / "a", space, trials=7, steps=1)
    assert all(t.outcome in ("complete", "pruned") for t in result.trials)
    frozen = fw.PrefixConfig(length=4, init="random", freeze_first=True)
    good, bad = SearchSpace(lengths=(1, 2), inits=("random",), base=frozen).points(zoo.build("llama"), zoo.tokenizer())
    assert {p.length for p in good} == {2} and {p.length for p in bad} == {1}
    again = SearchSpace(lengths=(40,), inits=(text,), base=fw.PrefixConfig(length=4, init="random", repeat=True))
    assert not again.points(zoo.build("llama"), zoo.tokenizer())[1]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_losses_by_example_are_those_of_the_model(name, tmp_path):
    seq2seq = name == "t5"
    examples = [{"input": s[:20], "output": s[20:]} for s in zoo.SENTENCES]
    from foreword.data import encode, read_examples

    rows = encode(read_examples(examples), zoo.tokenizer(), max_length=40, seq2seq=seq2seq)
    model, collator = zoo.build(name), Collator(0, seq2seq=seq2seq)
    runner = Runner(model, zoo.tokenizer(), rows, rows, collator, 2, 1, 0, {"use_cpu": True}, StopOnSignal(None))
    fw.attach(model, fw.PrefixConfig(length=3, init="random"), tokenizer=zoo.tokenizer())
    trainer = runner._trainer(tmp_path, 1, [])
    trainer.args.per_device_eval_batch_size = 2
    losses, tokens = runner.losses(trainer), runner.valid_tokens()
    model.eval()
    for i, (loss, count) in enumerate(zip(losses, tokens, strict=True)):
        with torch.no_grad():
            assert loss == pytest.approx(float(model(**collator([rows[i]])).loss) * count, rel=1e-4)


def test_a_comparison_is_the_paired_one_and_harder_for_the_best_of_many():
    generator = random.Random(3)
    default = [generator.uniform(20, 30) for _ in range(25)]
    best = [d - generator.gauss(0.6, 1) for d in default]
    found = compare(best, default, [10] * 25, 1)
    differences = [(d - b) / 10 for b, d in zip(best, default, strict=True)]
    assert found.gain == pytest.approx(statistics.mean(differences))
    assert found.error == pytest.approx(statistics.stdev(differences) / 5)
    assert found.needed == pytest.approx(1.96, abs=1e-3) and compare(best, default, [10] * 25, 20).needed > 3
    assert compare([d - 3 for d in default], default, [10] * 25, 9).clear
    assert not compare([d + 3 for d in default], default, [10] * 25, 9).clear
    assert not compare([1.0], [2.0], [3], 1).clear  # one example says nothing of the spread


# ---------------------------------------------------------------- budgets


def test_seconds_are_spent_once(tmp_path):
    result = search(tmp_path / "a", budget=Budget(seconds=4.0), steps=2)
    counted = len(result.trials)
    assert 1 <= counted < 40 and sum(t.seconds for t in result.trials) < 4 + max(t.seconds for t in result.trials)
    again = search(tmp_path / "a", budget=Budget(seconds=4.0), steps=2, resume=True)
    assert len(again.trials) <= counted + 1  # what a trial takes varies, so one more may still have fitted
    more = search(tmp_path / "a", budget=Budget(trials=len(again.trials) + 1), steps=2, resume=True)
    assert seen(more.trials)[:counted] == seen(result.trials) and len(more.trials) == len(again.trials) + 1


@pytest.mark.parametrize(
    ("text", "budget"),
    [("20", Budget(trials=20)), ("300s", Budget(seconds=300)), ("1.5m", Budget(seconds=90)),
     ("2h", Budget(seconds=7200))],
)  # fmt: skip
def test_budgets_are_read(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    ("text", "said"),
    [("0", "expected 1 or more"), ("-3", "expected 1 or more"), ("0s", "above 0"), ("ten", "neither"), ("", "neither")],
)  # fmt: skip
def test_budgets_are_refused(text, said):
    with pytest.raises(fw.ConfigError, match=said):
        Budget.parse(text)


# ---------------------------------------------------------------- kills


def start(out, trials, *more):
    command = [sys.executable, str(Path(searching.__file__)), str(out), str(trials), *more]
    return subprocess.Popen(command, env=tiny.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def looks(out):
    """How many validations are in the journal."""
    path = out / JOURNAL
    return path.read_bytes().count(b'"op_code":7') if path.exists() else 0


@pytest.mark.slow
def test_a_search_killed_four_times_is_the_search_unbroken(found, tmp_path):
    out, seed = tmp_path / "killed", time.time_ns()
    chance, killed = random.Random(seed), 0
    for at in (0, 6, 13, 21):
        process = start(out, 9, *(["--resume"] if (out / JOURNAL).exists() else []))
        while looks(out) <= at and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.7))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
    if chance.random() < 0.5:  # as a kill in the middle of a write would leave it
        with (out / JOURNAL).open("ab") as file:
            file.write(b'{"op_code":8,"worker_id":"x')
    process = start(out, 9, "--resume")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, (seed, err[-3000:])
    result = search(out, trials=9, resume=True)
    assert seen(result.trials) == seen(found[0].trials), seed
    assert 0 < Counter(t.outcome for t in result.trials)["stopped"] <= killed == 4, seed
    assert result.verdict.split(":")[1] == found[0].verdict.split(":")[1]
    assert not list(out.glob(".worker-*"))


def test_half_a_line_in_the_journal_is_taken_off(tmp_path):
    first = search(tmp_path / "a", trials=2)
    with (tmp_path / "a" / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"abc","tri')
    result = search(tmp_path / "a", trials=3, resume=True)
    assert seen(result.trials)[:2] == seen(first.trials) and len(result.trials) == 3
    assert all(json.loads(line) for line in (tmp_path / "a" / JOURNAL).read_text().splitlines())


@pytest.mark.slow
def test_two_processes_share_a_search(tmp_path):
    out = tmp_path / "shared"
    search(out, trials=1)
    for process in [start(out, 14, "--resume") for _ in range(2)]:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
    result = search(out, trials=14, resume=True)
    assert len(result.trials) == 14 and "stopped" not in {t.outcome for t in result.trials}
    assert [t.default for t in result.trials] == [True] + [False] * 13
    lines = (out / JOURNAL).read_text().splitlines()
    workers = {json.loads(line)["worker_id"] for line in lines if '"op_code":4' in line}
    assert len(workers) == 3  # each began trials


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    out = tmp_path_factory.mktemp("taken") / "search"
    search(out, trials=1, steps=2)
    return out


def refusal(name, tmp, taken):
    short = {"inits": ("The film",), "lengths": (30, 40)}
    return {
        "texts too short": ({"space": SearchSpace(**short, base=BASE)}, "no point .* has . tokens and the prefix 30"),
        "nothing to train": (
            {"space": SearchSpace(lengths=(1,), inits=("random",), base=fw.PrefixConfig(freeze_first=True))},
            "no point .* nothing to train",
        ),
        "bad default": (
            {"space": SearchSpace(base=fw.PrefixConfig(length=90, init="The film"))},
            "the default configuration.* has . tokens and the prefix 90",
        ),
        "no such site": ({"space": SearchSpace(base=fw.PrefixConfig(sites="nothing.*"))}, "nothing"),
        "too few seconds": ({"budget": Budget(seconds=0.01), "steps": 50}, "too small: a step takes .* of 50 steps"),
        "no validation": ({"valid": None}, "validation examples, and there are none"),
        "no steps": ({"steps": 0}, "steps=0; expected 1"),
        "taken": ({"out": taken, "steps": 2}, "holds a search already; go on with it"),
        "other steps": ({"out": taken, "steps": 3, "resume": True}, "another search: steps was 2 there and is 3 here"),
        "other space": (
            {"out": taken, "steps": 2, "resume": True, "space": SearchSpace(lengths=(3,), base=BASE)}, "lengths was",
        ),
        "other seed": ({"out": taken, "steps": 2, "resume": True, "seed": 4}, "seed was 0 there and is 4"),
        "other model": (
            {"out": taken, "steps": 2, "resume": True, "model": zoo.build("llama", seed=3)}, "the model was",
        ),
        "other data": (
            {"out": taken, "steps": 2, "resume": True, "valid": searching.data(zoo.SENTENCES)}, "the data was",
        ),
        "nothing to resume": ({"resume": True}, "holds no search; leave --resume out"),
        "a file": ({"out": tmp / "file"}, "is a file"),
        "something else": ({"out": tmp / "else"}, "holds prefix.safetensors, which is not of a search"),
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["texts too short", "nothing to train", "bad default", "no such site", "too few seconds", "no validation",
     "no steps", "taken", "other steps", "other space", "other seed", "other model", "other data",
     "nothing to resume", "a file", "something else"],
)  # fmt: skip
def test_bad_searches_are_refused_before_they_begin(name, taken, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "prefix.safetensors").write_text("")
    changes, said = refusal(name, tmp_path, taken)
    before = (taken / JOURNAL).read_bytes()
    out = changes.pop("out", tmp_path / "new")
    with pytest.raises(fw.ConfigError, match=said):
        search(out, changes.pop("space", SPACE), **{"trials": 2, **changes})
    assert not (tmp_path / "new").exists() and (taken / JOURNAL).read_bytes() == before
    assert not list(taken.glob(".worker-*"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"lengths": ()}, "lengths is empty"), ({"lengths": (5, 0)}, "length of 0"), ({"reparams": ("mpl",)}, "'mpl'"),
     ({"inits": ("random", " ")}, "empty text"), ({"learning_rates": (2e-2, 1e-3)}, "lowest <= highest"),
     ({"learning_rates": (0, 1e-3)}, "0 < lowest")],
)  # fmt: skip
def test_spaces_are_checked(fields, said):
    with pytest.raises(fw.ConfigError, match=said):
        SearchSpace(**fields)


def test_without_optuna_the_error_says_how_to_get_it():
    code = (
        "import sys; sys.modules['optuna'] = None\nimport foreword as fw\n"
        "try:\n    import foreword.train.tune\n"
        "except fw.MissingPartError as exc:\n    print(exc)\n"
    )
    environment = {**tiny.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "pip install 'foreword[tune]'" in done.stdout, done.stderr
