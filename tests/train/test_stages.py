"""Layer by layer: each stage trains its sites alone, at its rate, and a run that was interrupted knows its stage."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import losses, rows, trainer, tuned

import foreword as fw
from foreword.train.stages import LayerByLayer, Stage

PLAN = [Stage("last:1", 3, learning_rate=0.04, warmup=0.0), Stage("first:1", 2), Stage(None, 3, learning_rate=0.01)]


class Watch(transformers.TrainerCallback):
    """Copies of what is trained after each step, and the learning rates before it."""

    def __init__(self, tuning):
        self.tuning, self.copies, self.rates = tuning, [], []

    def copy(self):
        self.copies.append({n: p.detach().clone() for n, p in self.tuning.holder.named_parameters()})

    def on_train_begin(self, args, state, control, **kwargs):
        self.copy()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        self.copy()


def staged(out, plan=PLAN, config=None, resume=None, **arguments):
    model, tuning = tuned(**(config or {}))
    stages, watch = LayerByLayer(plan), Watch(tuning)
    settings = {"max_steps": stages.steps, "learning_rate": 0.02, "weight_decay": 0.1, **arguments}
    made = trainer(model, out, rows(), callbacks=[stages, watch], **settings)
    made.train(resume_from_checkpoint=resume)
    return made, tuning, watch


@pytest.mark.parametrize("config", [{}, {"gate": "head", "freeze_first": True}, {"gate": "input"}])
def test_each_stage_moves_its_sites_and_no_others(config, tmp_path):
    """Also not by momentum or weight decay, which the stage before left behind."""
    _, tuning, watch = staged(tmp_path, config=config)
    for step, (before, after) in enumerate(zip(watch.copies, watch.copies[1:], strict=False)):
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        sites = {n.rsplit(".", 1)[1] for n in moved}  # keys and gates are numbered as the sites are
        assert sites == ({"1"} if step < 3 else {"0"} if step < 5 else {"0", "1"}), step
    assert len(tuning.sites) == 2 and not any(p.requires_grad is False for p in tuning.encoder.parameters())


def test_rates_are_those_of_the_stages(tmp_path):
    _, _, watch = staged(tmp_path)
    expected = [0.04, 0.04 * 2 / 3, 0.04 / 3, 0.02, 0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3]
    assert watch.rates == pytest.approx(expected)


def test_warm_up_is_within_the_stage():
    factor = LayerByLayer(
        [Stage(None, 10, warmup=0.2), Stage(None, 4, learning_rate=0.5, warmup=0.0)]
    ).learning_rate_factor(1.0)
    assert [round(factor(s), 3) for s in (0, 1, 2, 9, 10, 13)] == [0.333, 0.667, 1.0, 0.125, 0.5, 0.125]


def test_a_memory_is_staged_with_its_prefix(tmp_path):
    import zoo

    model = zoo.build("llama")
    tuning = fw.attach(model, [fw.PrefixConfig(length=2, init="random"), fw.MemoryConfig(rank=2)])
    stages, watch = LayerByLayer([Stage([0], 4), Stage([1], 2)]), Watch(tuning)
    trainer(model, tmp_path, rows(), callbacks=[stages, watch], max_steps=6, save_strategy="no").train()
    first, last = watch.copies[0], watch.copies[4]
    assert {n for n in first if not torch.equal(first[n], last[n])} == {
        "encoder.keys.0", "encoder.values.0", "memory.matrix.0", "memory.up.0"
    }  # fmt: skip


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_resuming_gives_the_uninterrupted_run(checkpoint, tmp_path):
    whole, tuning, _ = staged(tmp_path)
    ended = [p.detach().clone() for p in tuning.parameters()]
    resumed, again, _ = staged(tmp_path, resume=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ended, strict=True))


@pytest.mark.parametrize("order", ["top-down", "bottom-up"])
def test_groups_grow_over_all_layers(order):
    word = "last" if order == "top-down" else "first"
    plan = LayerByLayer.in_groups(30, 4, 203, order=order)
    assert [s.sites for s in plan.stages] == [f"{word}:8", f"{word}:15", f"{word}:23", f"{word}:30"]
    assert plan.steps == 203 and [s.steps for s in plan.stages] == [50, 51, 51, 51]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: staged(out, plan=[]), "needs a stage"),
        (lambda out: staged(out, plan=[Stage("nowhere", 3)]), "leaves no site"),
        (lambda out: staged(out, max_steps=7), "set max_steps=8"),
        (lambda out: staged(out, config={"reparam": "mlp", "hidden": 8}), 'use reparam="direct"'),
        (lambda out: Stage(None, 0), "expected 1 or more"),
        (lambda out: Stage(None, 3, warmup=1.0), "from 0 to below 1"),
        (lambda out: LayerByLayer.in_groups(4, 5, 10), "expected 1 to 4"),
        (lambda out: LayerByLayer.in_groups(4, 4, 3), "too few for 4 stages"),
    ],
)
def test_bad_plans_are_refused_before_training(make, message, tmp_path):
    with pytest.raises(fw.ConfigError, match=message):
        make(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_orthogonal_layers():
    _, tuning = tuned(reparam="mlp", hidden=16, depth=3, orthogonal=True)
    layers = [m for m in tuning.encoder.nets[0] if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 3
    for layer in layers:
        small = min(layer.weight.shape)
        weight = layer.weight if layer.weight.shape[0] == small else layer.weight.T
        torch.testing.assert_close(weight @ weight.T, torch.eye(small), atol=1e-5, rtol=0)
        assert not layer.bias.any()
    with pytest.raises(fw.ConfigError, match="layers of an MLP"):
        fw.PrefixConfig(orthogonal=True)


@pytest.mark.parametrize(
    "asked", [{"lr_scheduler_type": "cosine"}, {"lr_scheduler_kwargs": {"num_cycles": 1}}, "a scheduler"]
)
def test_another_schedule_beside_stages_is_refused(asked, tmp_path):
    model, tuning = tuned()
    stages = LayerByLayer([Stage(None, 4)])
    arguments = {} if asked == "a scheduler" else asked
    made = trainer(model, tmp_path, callbacks=[stages], max_steps=4, **arguments)
    if asked == "a scheduler":
        made.optimizer = torch.optim.SGD(tuning.parameters(), 0.1)
        made.lr_scheduler = torch.optim.lr_scheduler.StepLR(made.optimizer, 2)
    with pytest.raises(fw.ConfigError, match="each stage of LayerByLayer warms up and falls to 0 linearly"):
        made.train()


@pytest.mark.parametrize("by", ["arguments", "configuration", "optimizer"])
def test_a_stages_rate_is_its_own_whatever_the_runs(by, tmp_path):
    model, tuning = tuned(**({"learning_rate": 0.05} if by == "configuration" else {}))
    seen = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer.param_groups[0]["lr"])

    stages = LayerByLayer([Stage(None, 2, learning_rate=0.01, warmup=0.0), Stage(None, 2, warmup=0.0)])
    made = trainer(model, tmp_path, callbacks=[stages, Look()], max_steps=4, learning_rate=0.02, save_strategy="no")
    if by == "optimizer":
        made.optimizer = torch.optim.AdamW(tuning.parameters(), 0.08)
    made.train()
    run = {"arguments": 0.02, "configuration": 0.05, "optimizer": 0.08}[by]
    assert seen == pytest.approx([0.01, 0.005, run, run / 2])


def test_a_stage_with_a_rate_in_a_run_without_one_is_refused():
    stages = LayerByLayer([Stage(None, 2, learning_rate=0.01), Stage(None, 2)])
    with pytest.raises(fw.ConfigError, match="learning_rate=0 trains nothing, and a stage has a learning rate"):
        stages.learning_rate_factor(0.0)
    assert LayerByLayer([Stage(None, 2, warmup=0.0)]).learning_rate_factor(0.0)(0) == 1.0
