"""Prefixes that grow: no jump when tokens come in, the same run after a kill, a report of what a length is worth."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from tiny import losses, rows, trainer, tuned

import foreword as fw
import zoo
from foreword.train.growth import Growth, growth_report

EAGER = {"start": 2, "step": 3, "threshold": 10.0, "settle": 3}  # never content: grows whenever it may
RUN = {"max_steps": 24, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, "learning_rate": 0.05}
CONFIGS = [
    {}, {"reparam": "mlp", "hidden": 8}, {"reparam": "low-rank", "rank": 2}, {"freeze_first": True},
    {"gate": "head"}, {"gate": "zero"}, {"lengths": {r".*layers\.0.*": 4, ".*": 9}},
]  # fmt: skip


def grown(out, config=None, growth=None, resume=None, **arguments):
    model, tuning = tuned(**{"length": 9, **(config or {})})
    made = trainer(model, out, valid=rows(8, seed=9), callbacks=[Growth(**(growth or EAGER))], **{**RUN, **arguments})
    made.train(resume_from_checkpoint=resume)
    return made, tuning


@pytest.mark.parametrize("config", CONFIGS)
def test_the_loss_does_not_jump(config):
    """Right after growth it is what it was; as the new tokens come in, it changes."""
    model, tuning = tuned(**{"length": 9, **config})
    for gate in tuning.holder.gate.values():
        gate.data.fill_(0.5)
    tuning.grow_to(4)
    ids = zoo.ids(2)
    before = zoo.logits(model, input_ids=ids)
    tuning.grow_to(7, (3, 0.0))
    torch.testing.assert_close(zoo.logits(model, input_ids=ids), before, atol=1e-5, rtol=1e-4)
    tuning.grow_to(7, (3, 0.5))
    half = zoo.logits(model, input_ids=ids)
    tuning.grow_to(7)
    full = zoo.logits(model, input_ids=ids)
    assert (half - before).abs().max() > 1e-3 and (full - half).abs().max() > 1e-3
    assert tuning.bake().longest == 7


def test_tokens_to_come_do_not_learn():
    model, tuning = tuned(length=9)
    tuning.grow_to(4)
    ids = zoo.ids(2)
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter in tuning.encoder.parameters():
        assert parameter.grad[:, :4].any() and not parameter.grad[:, 4:].any()


@pytest.mark.parametrize("config", [{}, {"reparam": "mlp", "hidden": 8}, {"freeze_first": True}])
def test_it_grows_to_the_most_and_reports(config, tmp_path):
    made, tuning = grown(tmp_path, config)
    report = json.loads((tmp_path / "growth.json").read_text())
    assert [c["length"] for c in report["curve"]] == [2, 5, 8, 9]
    assert all(c["best_eval_loss"] is not None for c in report["curve"])
    assert report["recommended_length"] in (2, 5, 8, 9) and (tmp_path / "growth.png").stat().st_size > 1000
    assert tuning.encoder.opening is None and tuning.bake().longest == 9
    steps = [c["from_step"] for c in report["curve"]]
    assert all(b - a >= 3 for a, b in pairwise(steps[1:])) and made.state.max_steps - steps[-1] >= 3


def test_a_prefix_that_gains_stays_short(tmp_path):
    made, tuning = grown(tmp_path, growth={**EAGER, "threshold": 0.0}, learning_rate=1e-3)
    evaluated = [e["eval_loss"] for e in made.state.log_history if "eval_loss" in e]
    falling = all(b < a for a, b in pairwise(evaluated))
    assert falling == (tuning.bake().longest == 2)


@pytest.mark.parametrize("checkpoint", [4, 8, 12])
@pytest.mark.parametrize("config", [{}, {"reparam": "mlp", "hidden": 8}])
def test_resuming_gives_the_uninterrupted_run(config, checkpoint, tmp_path):
    """From before, while and after tokens come in."""
    whole, tuning = grown(tmp_path / "run", config)
    ended = [p.detach().clone() for p in tuning.parameters()]
    resumed, again = grown(tmp_path / "run", config, resume=str(tmp_path / "run" / f"checkpoint-{checkpoint}"))
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ended, strict=True))
    events = [e for e in resumed.state.log_history if "prefix_length" in e]
    assert events == [e for e in whole.state.log_history if "prefix_length" in e] and len(events) == 3


def test_the_best_checkpoint_has_its_length(tmp_path):
    made, tuning = grown(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False, save_steps=2,
        learning_rate=300.0, max_grad_norm=0.0, warmup_steps=0,
    )  # fmt: skip
    best = int(made.state.best_model_checkpoint.rsplit("-", 1)[1])
    events = [(0, 2), *((e["step"], e["prefix_length"]) for e in made.state.log_history if "prefix_length" in e)]
    expected = max(length for step, length in events if step < best or step == 0)
    assert tuning.encoder.active == expected < events[-1][1]
    assert made.evaluate()["eval_loss"] == pytest.approx(made.state.best_metric, rel=1e-6)


def test_new_tokens_take_steps_of_the_usual_size(tmp_path):
    """Without what Adam has seen of the others they would go several times too far."""
    moved = {}

    class Watch(Growth):
        def on_step_end(self, args, state, control, **kwargs):
            keys = self.tuning.encoder.keys[0].detach().clone()
            if (before := moved.get("at")) is not None:
                step = (keys - before).norm(dim=-1).mean(0)
                moved.setdefault("steps", []).append((self.tuning.encoder.active, step))
            moved["at"] = keys

    model, _ = tuned(length=9)
    watch = Watch(start=4, step=5, threshold=10.0, settle=3)
    trainer(model, tmp_path, valid=rows(8, seed=9), callbacks=[watch], **{**RUN, "warmup_steps": 0}).train()
    after = [step for active, step in moved["steps"] if active == 9]
    assert after and all(float(s[4:].mean() / s[:4].mean()) < 3 for s in after)


@pytest.mark.parametrize("config", [{}, {"reparam": "mlp", "hidden": 8}, {"freeze_first": True}])
def test_what_the_optimizer_knows_of_the_old_tokens_is_kept(config, tmp_path):
    before, compared = {}, []

    class Watch(Growth):
        def on_evaluate(self, args, state, control, optimizer=None, **kwargs):
            active = self.tuning.encoder.active
            for parameter in self.tuning.parameters():
                before[parameter] = {k: v.clone() for k, v in optimizer.state[parameter].items()}
            super().on_evaluate(args, state, control, optimizer=optimizer, **kwargs)
            if self.tuning.encoder.active == active:
                return
            by_token = {id(p) for _, p in self.tuning.encoder.by_token()}
            old = active - (1 if config.get("freeze_first") else 0)
            for parameter, states in before.items():
                for name, value in states.items():
                    now, kept = optimizer.state[parameter][name], ...
                    if id(parameter) in by_token and value.dim():  # of the new ones: what _settle_steps gave them
                        kept = (..., slice(old), slice(None))
                    assert torch.equal(now[kept], value[kept]) and (not value.dim() or now[kept].any())
                    compared.append(name)

    model, _ = tuned(**{"length": 9, **config})
    trainer(model, tmp_path, valid=rows(8, seed=9), callbacks=[Watch(**EAGER)], **RUN).train()
    assert set(compared) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("growth", "config", "arguments", "message"),
    [
        ({"start": 9}, {}, {}, "the prefix has 9 at most"),
        ({"start": 0}, {}, {}, "expected 1 or more"),
        ({"step": 0}, {}, {}, "expected 1 or more"),
        ({}, {}, {"eval_strategy": "no"}, "watches the validation loss"),
        ({"settle": 21}, {}, {}, "would never grow.* the second after 4 steps.* 21 steps to settle.* the run has 24"),
        ({}, {}, {"eval_steps": 12}, "would never grow"),
        ({}, {}, {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, "would never grow"),
        ({}, {"reparam": "mlp", "condition": 3}, {}, "made of a condition can't grow"),
    ],
)
def test_bad_plans_are_refused_before_training(growth, config, arguments, message, tmp_path):
    with pytest.raises(fw.ConfigError, match=message):
        grown(tmp_path, config, {**EAGER, **growth}, **arguments)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_report_recommends_the_shortest_that_is_nearly_best():
    history = [
        {"eval_loss": 3.0, "step": 2}, {"eval_loss": 2.02, "step": 4}, {"prefix_length": 10, "step": 4},
        {"eval_loss": 2.01, "step": 6}, {"prefix_length": 15, "step": 6}, {"eval_loss": 2.0, "step": 8},
    ]  # fmt: skip
    report = growth_report(history, 5, 0.01)
    assert report["recommended_length"] == 5 and report["best_eval_loss"] == 2.0
    assert growth_report(history, 5, 0.001)["recommended_length"] == 15
    assert growth_report([], 5, 0.01)["recommended_length"] is None
