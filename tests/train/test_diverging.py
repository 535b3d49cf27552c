"""Training that diverges stops, names step and batch, and leaves the last good prefix."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

import foreword as fw
import zoo

LATE = 5  # a row that this seed's shuffling brings in the third step or later


def assert_last_good(out):
    """The last good prefix is there, finite, and gives a finite loss."""
    prefix = fw.Prefix.load(out / "last-good")
    assert all(torch.isfinite(t).all() for t in (*prefix.keys.values(), *prefix.values.values()))
    fresh = zoo.build("llama")
    fw.attach(fresh, prefix)
    ids = zoo.ids()
    assert torch.isfinite(fresh(input_ids=ids, labels=ids).loss)


def test_a_nan_loss_stops_and_names_step_and_batch(tmp_path):
    data = tiny.rows()
    data[LATE] = {"input_ids": [99, 5, 6], "labels": [-100, 5, 6]}
    model, tuning = tiny.tuned()
    with torch.no_grad():
        model.get_input_embeddings().weight[99] = float("nan")
    made = tiny.trainer(model, tmp_path, data, save_strategy="no", warmup_steps=0)
    start = tuning.bake()
    with pytest.raises(fw.DivergedError, match=r"diverged at step \d: the loss is nan on the batch of shape") as caught:
        made.train()
    step = made.state.global_step + 1
    assert f"step {step}:" in str(caught.value) and "learning rate (it was 0.02)" in str(caught.value)
    assert str(tmp_path / "last-good") in str(caught.value)
    assert_last_good(tmp_path)
    assert step > 2 and fw.Prefix.load(tmp_path / "last-good") != start


def test_a_nan_loss_at_the_first_step_saves_the_start(tmp_path):
    model, tuning = tiny.tuned()
    with torch.no_grad():
        model.get_input_embeddings().weight[99] = float("nan")
    bad = [{"input_ids": [99, 5, 6], "labels": [-100, 5, 6]}] * 4
    start = tuning.bake()
    with pytest.raises(fw.DivergedError, match="step 1: the loss is nan on the batch of shape"):
        tiny.trainer(model, tmp_path, bad).train()
    now = tuning.bake()
    assert all(torch.equal(start.keys[s], now.keys[s]) for s in start.keys)


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_learning_rate_beyond_reason_stops(clip, tmp_path):
    model, _ = tiny.tuned()
    made = tiny.trainer(model, tmp_path, learning_rate=1e38, warmup_steps=0, max_grad_norm=clip, max_steps=30)
    with pytest.raises(fw.DivergedError, match=r"diverged at step \d+: the (loss|gradient's norm) is (nan|inf)"):
        made.train()
    assert_last_good(tmp_path)


def test_an_exploding_gradient_stops(tmp_path):
    model, tuning = tiny.tuned()

    class Spike(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            spikes.append(float(made._norms[-1]))

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 12:
                for parameter in tuning.parameters():
                    parameter.register_hook(lambda grad: grad * 1e4)

    spikes = []
    made = tiny.trainer(model, tmp_path, callbacks=[Spike()], max_steps=20)
    with pytest.raises(fw.DivergedError, match=r"step 13: the gradient's norm is \S+, 1000 times the usual"):
        made.train()
    assert len(spikes) == 12
    assert_last_good(tmp_path)
