"""What the monitor writes: each site's gradient norm and share of attention, without touching the run."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny import losses, rows, trainer, tuned

import foreword as fw
import zoo
from foreword.train.monitor import Monitor


def lines(folder):
    return [json.loads(line) for line in (folder / "monitor.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("config", [{}, {"reparam": "mlp", "hidden": 8}, {"gate": "zero"}])
def test_norms_and_shares_of_each_site(config, tmp_path):
    model, tuning = tuned(**config)
    trainer(model, tmp_path, callbacks=[Monitor(every=2)]).train()
    looks = lines(tmp_path)
    assert [look["step"] for look in looks] == [1, 3, 5]
    for look in looks:
        assert list(look["sites"]) == [s.name for s in tuning.sites]
        for site in look["sites"].values():
            assert site["gradient_norm"] > 0 or config.get("gate") == "zero"
            share = site["attention_share"]
            assert share is None if config.get("gate") == "zero" else 0 < share < 1
    assert (tmp_path / "monitor.png").stat().st_size > 1000


def test_the_norm_is_the_gradients(tmp_path):
    model, tuning = tuned()
    found = {}

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            pairs = zip(tuning.encoder.names, tuning.encoder.keys, tuning.encoder.values, strict=True)
            found.setdefault(state.global_step + 1, {
                n: float((k.grad.square().sum() + v.grad.square().sum()).sqrt()) for n, k, v in pairs
            })  # fmt: skip

    trainer(model, tmp_path, callbacks=[Monitor(every=3), Look()], max_grad_norm=0.0).train()
    for look in lines(tmp_path):
        for name, site in look["sites"].items():
            assert site["gradient_norm"] == pytest.approx(found[look["step"]][name], rel=1e-4)


def test_it_changes_nothing_and_leaves_nothing(tmp_path):
    model, tuning = tuned(dropout=0.1)
    plain = trainer(model, tmp_path / "plain")
    plain.train()
    ended = [p.detach().clone() for p in tuning.parameters()]
    model, tuning = tuned(dropout=0.1)
    watched = trainer(model, tmp_path / "watched", callbacks=[Monitor(every=1)])
    watched.train()
    assert losses(watched) == losses(plain)
    assert all(torch.equal(a, b) for a, b in zip(tuning.parameters(), ended, strict=True))
    assert not tuning.encoder._forward_hooks and not any(p._backward_hooks for p in tuning.parameters())
    tuning.detach()
    assert zoo.logits(model, input_ids=zoo.ids()).isfinite().all()


def test_a_resumed_run_repeats_no_line(tmp_path):
    model, _ = tuned()
    trainer(model, tmp_path, callbacks=[Monitor(every=1)]).train()
    before = lines(tmp_path)
    model, _ = tuned()
    trainer(model, tmp_path, callbacks=[Monitor(every=1)]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert lines(tmp_path) == before


def test_a_line_that_a_kill_cut_short_is_written_again(tmp_path):
    model, _ = tuned()
    trainer(model, tmp_path, callbacks=[Monitor(every=1)]).train()
    before, path = lines(tmp_path), tmp_path / "monitor.jsonl"
    path.write_text(path.read_text()[:-40])
    model, _ = tuned()
    trainer(model, tmp_path, callbacks=[Monitor(every=1)]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert lines(tmp_path) == before


def test_bad_use(tmp_path):
    with pytest.raises(fw.ConfigError, match="1 or more steps"):
        Monitor(every=0)
    model = zoo.build("llama")
    fw.attach(model, fw.MemoryConfig(rank=1))
    with pytest.raises(fw.ConfigError, match="no virtual tokens"):
        trainer(model, tmp_path, rows(), callbacks=[Monitor()]).train()
