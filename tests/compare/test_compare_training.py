"""Training for a comparison: the same examples for every method, steps or seconds, and the loss that Trainer has."""

from __future__ import annotations

import math

import comparing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.compare import Budget
from foreword.compare.training import Ordered, Paced, subset, train
from foreword.data import Collator, encode, read_examples
from foreword.losses import example_losses, supervised_tokens

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}


def data(records=comparing.RECORDS):
    return encode(read_examples(records), zoo.tokenizer(), max_length=40)


@given(st.integers(1, 40), st.integers(0, 3), st.integers(1, 60))
def test_every_epoch_is_a_permutation(size, seed, length):
    class Sized(list):
        pass

    ordered = Ordered(Sized(range(size)), seed, length)
    places = [ordered.place(i) for i in range(3 * size)]
    for epoch in range(3):
        assert sorted(places[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert places == [Ordered(Sized(range(size)), seed, length).place(i) for i in range(3 * size)]
    assert len(ordered) == length


@given(st.integers(1, 50), st.integers(0, 5), st.data())
def test_a_smaller_draw_is_part_of_a_larger_one(size, seed, draw):
    records = [{"n": i} for i in range(size)]
    small, large = sorted((draw.draw(st.integers(1, size)), draw.draw(st.integers(1, size))))
    few, many = subset(records, small, seed), subset(records, large, seed)
    assert many[:small] == few and len({r["n"] for r in many}) == large
    assert subset(records, None, seed) == records


class Seen(Collator):
    """Remembers what it made batches of."""

    def __call__(self, examples):
        self.__dict__.setdefault("batches", []).append([tuple(e["input_ids"]) for e in examples])
        return super().__call__(examples)


def run(config, budget, work, *, looks=2, seed=3, told=None, collator=None, valid=None, **more):
    model = zoo.build("llama")
    torch.manual_seed(seed)
    tuning = fw.attach(model, config, tokenizer=zoo.tokenizer())
    found = train(
        model, data(), valid or data(), collator or Collator(0), work, budget=budget, batch_size=4, seed=seed,
        looks=looks, tell=told or (lambda what: None), **more,
    )  # fmt: skip
    return tuning, *found


@pytest.mark.parametrize("config", [fw.LoRAConfig(rank=2), fw.MemoryConfig(), fw.FullConfig()])
def test_every_method_sees_the_same_batches(config, tmp_path):
    orders, tokens = [], []
    for i, each in enumerate((fw.PrefixConfig(length=3, init="random"), config)):
        collator = Seen(0)
        _, _, seen, message = run(each, Budget(steps=5), tmp_path / str(i), looks=1, collator=collator)
        assert not message and seen["steps"] == 5 and seen["examples"] == 20
        orders.append([b for b in collator.batches if len(b) == 4][:5])
        tokens.append((seen["supervised_tokens"], seen["order"]))
    assert orders[0] == orders[1] and tokens[0] == tokens[1]
    lengths = {tuple(data()[i]["input_ids"]): n for i, n in enumerate(supervised_tokens(data(), seq2seq=False))}
    assert tokens[0][0] == sum(lengths[ids] for batch in orders[0] for ids in batch)


def test_the_losses_are_those_of_a_trainer(tmp_path):
    """Plain PrefixTrainer on the examples in the same order ends with the same prefix and the same validation loss."""
    config = fw.PrefixConfig(length=3, init="random", seed=1)
    tuning, watch, seen, _ = run(config, Budget(steps=5), tmp_path / "ours")
    ours = tuning.bake()
    tuning.detach()

    whole = data()
    ordered = Ordered(whole, 3, 20)
    model = zoo.build("llama")
    torch.manual_seed(3)
    fw.attach(model, config, tokenizer=zoo.tokenizer())
    arguments = {"max_steps": 5, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "theirs"), "seed": 3}
    trainer = fw.PrefixTrainer(
        model, fw.PrefixTrainingArguments(**QUIET, **arguments, save_strategy="no"),
        train_dataset=[ordered[i] for i in range(20)], eval_dataset=whole, data_collator=Collator(0),
    )  # fmt: skip
    trainer._get_train_sampler = lambda *given: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    assert trainer.tuning.bake() == ours
    # Trainer's is the mean over batches; by tokens it is the mean over all.
    trainer.args.per_device_eval_batch_size = len(whole)
    assert watch.curve[-1]["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert [p["step"] for p in watch.curve] == [0, 3, 5] and seen["steps"] == 5


@pytest.mark.parametrize(("looks", "wanted"), [(1, [7]), (2, [0, 4, 7]), (3, [0, 3, 5, 7]), (20, [0, *range(1, 8)])])
def test_looks_are_spread_over_the_budget(looks, wanted, tmp_path):
    _, watch, _, _ = run(fw.PrefixConfig(length=2, init="random"), Budget(steps=7), tmp_path, looks=looks)
    assert [p["step"] for p in watch.curve] == wanted
    assert watch.seconds > 0 and [p["seconds"] for p in watch.curve] == sorted(p["seconds"] for p in watch.curve)


@pytest.mark.parametrize(
    "config",
    [fw.PrefixConfig(length=2, init="random", reparam="mlp", learning_rate=0.02), fw.FullConfig(learning_rate=0.01)],
)
def test_the_state_of_the_best_validation_is_kept(config, tmp_path):
    """Validated on what is never said, so that the more is learned, the worse it is."""
    other = [{**r, "output": " 9 9 9 9"} for r in comparing.RECORDS]
    left = {}
    for keep in ("last", "best"):
        tuning, watch, _, message = run(
            config, Budget(steps=24), tmp_path / keep, looks=24, keep=keep, valid=data(other)
        )
        assert not message
        with torch.no_grad():
            left[keep] = math.fsum(example_losses(tuning.model, data(other), Collator(0)))
        left[keep] /= sum(supervised_tokens(data(other), seq2seq=False))
    losses = [p["loss"] for p in watch.curve]
    assert min(losses) < losses[-1] - 0.01
    assert left == {"last": pytest.approx(losses[-1], rel=1e-5), "best": pytest.approx(min(losses), rel=1e-5)}


def test_seconds_of_training_end_a_run(tmp_path, monkeypatch):
    """With a clock that moves half a second a step, 5 seconds are 10 steps, whatever validation takes."""
    from foreword.compare import training

    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    rates = []

    class Ticking(Paced):
        def training_step(self, *given, **more):
            now[0] += 0.5
            rates.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(*given, **more)

    monkeypatch.setattr(training, "Paced", Ticking)

    def told(what):
        now[0] += 100.0 if "valid" in what else 0.0  # not in a step

    _, watch, seen, _ = run(fw.PrefixConfig(length=2, init="random"), Budget(seconds=5), tmp_path, looks=5, told=told)
    assert watch.seconds == 5.0 and seen["steps"] == 10 == len(rates)
    assert [p["step"] for p in watch.curve] == [0, 2, 4, 6, 8, 10]
    peak = 2e-2  # after a tenth of the time; from there it falls evenly
    wanted = [0.0, *(peak * (1 - k / 10) / 0.9 for k in range(1, 10))]
    assert rates == pytest.approx([w if w < peak else peak for w in wanted])


def test_what_diverges_is_said(tmp_path):
    config = fw.FullConfig(learning_rate=1e30)
    _, watch, seen, message = run(config, Budget(steps=6), tmp_path)
    assert "diverged" in message or "validation loss is" in message
    assert "Try a third" not in message and seen["steps"] <= 6
    assert all(math.isfinite(p["loss"]) for p in watch.curve[:1])
