"""Divergence with a RollBack: the run goes back to where it was well, with a smaller step, and says so."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import transformers

import foreword as fw
from foreword.train.rollback import RollBack

CALM = {"max_steps": 20, "warmup_steps": 0, "save_steps": 4}


class Spike(transformers.TrainerCallback):
    """Multiplies the gradients of one step."""

    def __init__(self, tuning, at, factor=1e4):
        self.tuning, self.at, self.factor, self.handles = tuning, at, factor, []

    def on_step_begin(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if state.global_step in self.at:
            self.handles = [p.register_hook(lambda g: g * self.factor) for p in self.tuning.parameters()]


class Watch(transformers.TrainerCallback):
    def __init__(self, tuning):
        self.tuning, self.after, self.states, self.rates = tuning, {}, {}, {}

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.after[state.global_step] = [p.detach().clone() for p in self.tuning.parameters()]
        self.states[state.global_step] = copy.deepcopy([dict(optimizer.state[p]) for p in self.tuning.parameters()])
        self.rates[state.global_step] = optimizer.param_groups[0]["lr"]


def run(out, recovery, at=(), factor=1e4, resume=None, data=None, **arguments):
    model, tuning = tiny.tuned()
    watch = Watch(tuning)
    callbacks = [recovery, Spike(tuning, at, factor), watch] if recovery else [Spike(tuning, at, factor), watch]
    made = tiny.trainer(model, out, data, callbacks=callbacks, **{**CALM, **arguments})
    made.train(resume_from_checkpoint=resume)
    return made, watch


def events(made):
    return [e for e in made.state.log_history if "rolled_back" in e]


@pytest.mark.parametrize("factor", [1e4, float("inf")])
def test_it_goes_back_to_the_copy_with_a_smaller_step(factor, tmp_path):
    with pytest.warns(UserWarning, match="went back to step 12 with 0.5 of the learning rate"):
        made, watch = run(
            tmp_path, RollBack(factor=0.5, every=4), at=(14,), factor=factor, lr_scheduler_type="constant"
        )
    (event,) = events(made)
    assert (event["step"], event["to_step"]) == (14, 12) and "the gradient's norm is" in event["because"]
    assert all(torch.equal(a, b) for a, b in zip(watch.after[15], watch.after[12], strict=True))
    for now, then in zip(watch.states[15], watch.states[12], strict=True):
        assert now.keys() == then.keys() and all(torch.equal(now[k], then[k]) for k in now)
    assert watch.rates[14] == pytest.approx(0.02) and watch.rates[16] == pytest.approx(0.01) == watch.rates[20]
    assert not torch.equal(watch.after[16][0], watch.after[15][0]) and made.state.global_step == 20
    record = fw.Prefix.load(tmp_path / "checkpoint-20").metadata["training"]
    assert record["rolled_back"][0]["step"] == 14


def test_a_state_that_is_not_well_is_not_kept(tmp_path):
    """Step 12's own outcome is bad, so the copy made after it is not what the run goes back to."""
    with pytest.warns(UserWarning, match="went back to step 8"):
        made, _ = run(tmp_path, RollBack(every=4), at=(12,))
    assert events(made)[0]["to_step"] == 8


def test_a_nan_row_is_passed_over(tmp_path):
    data = tiny.rows()
    data[9] = {"input_ids": [99, 5, 6], "labels": [-100, 5, 6]}
    model, tuning = tiny.tuned()
    with torch.no_grad():
        model.get_input_embeddings().weight[99] = float("nan")
    made = tiny.trainer(model, tmp_path, data, callbacks=[RollBack(times=9, every=1)], **CALM)
    with pytest.warns(UserWarning, match="the loss is nan"):
        made.train()
    assert 1 <= len(events(made)) <= 5 and all(torch.isfinite(p).all() for p in tuning.parameters())


def test_too_high_a_rate_comes_down(tmp_path):
    """A rate that diverges at once is divided until the run holds."""
    with pytest.warns(UserWarning, match="went back"):
        made, _ = run(tmp_path, RollBack(times=30, factor=1e-3, every=1), learning_rate=1e38)
    tiny_losses = tiny.losses(made)
    assert tiny_losses[20] < 10 and events(made)


def test_after_its_times_it_stops_with_the_last_good(tmp_path):
    with pytest.warns(UserWarning, match="1 of 1 times"), pytest.raises(fw.DivergedError, match="step 17"):
        run(tmp_path, RollBack(times=1, every=4), at=(14, 16))
    assert fw.Prefix.load(tmp_path / "last-good").longest == 4


@pytest.mark.filterwarnings("ignore:the gradient's norm")
def test_resuming_gives_the_uninterrupted_run(tmp_path):
    """The smaller step and the count of times are in the checkpoint."""
    whole, watch = run(tmp_path, RollBack(times=1, factor=0.5, every=4), at=(11,))
    resumed, again = run(
        tmp_path, RollBack(times=1, factor=0.5, every=4), resume=str(tmp_path / "checkpoint-16"), at=()
    )
    assert tiny.losses(resumed) == tiny.losses(whole) and events(resumed) == events(whole)
    assert all(torch.equal(a, b) for a, b in zip(again.after[20], watch.after[20], strict=True))


def test_a_loss_that_rises_and_stays_a_number(tmp_path):
    """Ruined at one step, as by a step far too long; no gradient looks unusual."""
    model, tuning = tiny.tuned()
    watch = Watch(tuning)

    class Ruin(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 20:
                for parameter in tuning.encoder.values:
                    parameter.data.mul_(-40.0)

    recovery = RollBack(every=5, worse=1.05, window=4, factor=0.5)  # an epoch has four batches
    made = tiny.trainer(
        model, tmp_path, callbacks=[recovery, Ruin(), watch], **{**CALM, "max_steps": 40, "explode_factor": 1e9},
        lr_scheduler_type="constant",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="the training loss rose to"):
        made.train()
    (event,) = events(made)
    assert 20 <= event["step"] <= 25 and event["to_step"] <= 20
    losses = tiny.losses(made)
    ruined, after = (sum(losses[s] for s in steps) / len(steps) for steps in (range(21, 24), range(29, 41)))
    assert after < ruined - 0.2


def test_a_calm_run_is_left_alone(tmp_path):
    made, _ = run(tmp_path / "with", RollBack(every=2))
    plain, _ = run(tmp_path / "without", None)
    assert not events(made) and tiny.losses(made) == tiny.losses(plain)


def schedules(optimizer):
    """Schedules that keep their rates in places of their own, each as if for ever 0.02."""
    of = torch.optim.lr_scheduler
    return {
        "step": of.StepLR(optimizer, 1000),
        "chained": of.ChainedScheduler([of.StepLR(optimizer, 1000), of.ConstantLR(optimizer, 1.0)]),
        "sequence": of.SequentialLR(
            optimizer, [of.ConstantLR(optimizer, 1.0), of.LambdaLR(optimizer, lambda s: 1.0)], [16]
        ),
        "one cycle": of.OneCycleLR(optimizer, 0.02, 1000, pct_start=0.999, div_factor=1.0, cycle_momentum=False),
        "cyclic": of.CyclicLR(optimizer, 0.02, 0.02, cycle_momentum=False),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["step", "chained", "sequence", "one cycle", "cyclic"])
def test_the_smaller_rate_stays_whatever_the_schedule(name, tmp_path):
    model, tuning = tiny.tuned()
    watch, optimizer = Watch(tuning), torch.optim.AdamW(tuning.parameters(), 0.02)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, save_strategy="no", per_device_train_batch_size=4, **tiny.QUIET
    )
    made = fw.PrefixTrainer(
        model, arguments, train_dataset=tiny.rows(), data_collator=tiny.Collator(0),
        callbacks=[RollBack(factor=0.5, every=4), Spike(tuning, (14,)), watch],
        optimizers=(optimizer, schedules(optimizer)[name]),
    )  # fmt: skip
    made.train()
    assert len(events(made)) == 1
    assert watch.rates[14] == pytest.approx(0.02, rel=1e-3)
    assert [watch.rates[step] for step in (16, 18, 20)] == pytest.approx([0.01] * 3, rel=1e-3)


@pytest.mark.filterwarnings("ignore:the gradient's norm")
@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_watch_the_loss_go_back_as_well(name, tmp_path):
    made, watch = run(
        tmp_path, RollBack(factor=0.5, every=4), at=(14,), lr_scheduler_type=name, eval_strategy="steps", eval_steps=4,
        valid=tiny.rows(4, seed=1), lr_scheduler_kwargs={"patience": 99},
    )  # fmt: skip
    assert len(events(made)) == 1 and (watch.rates[14], watch.rates[20]) == pytest.approx((0.02, 0.01))


@pytest.mark.parametrize("bad", [{"times": 0}, {"every": 0}, {"factor": 1.0}, {"factor": 0.0}, {"worse": 1.0}])
def test_bad_settings(bad):
    with pytest.raises(fw.ConfigError, match="expected 1 or more times"):
        RollBack(**bad)
