"""Training prefixes that are given something row by row: a condition vector, or a task."""

from __future__ import annotations

import pytest
import torch
from tiny import assert_base_unchanged, base_weights, losses, rows, trainer, tuned

import foreword as fw
import zoo

SIZE = 4


def signs(n, seed):
    """Vectors whose first number's sign says which of two ways the text goes on."""
    condition = torch.randn(n, SIZE, generator=torch.Generator().manual_seed(seed))
    ends = [[20, 21] if c[0] > 0 else [50, 51] for c in condition]
    return [
        {"input_ids": [7, 8, 9, *end], "labels": [-100] * 3 + end, "condition": c}
        for c, end in zip(condition, ends, strict=True)
    ]


@pytest.mark.parametrize("unused", [False, True])
def test_what_a_vector_means_is_learned(unused, tmp_path):
    """Held-out vectors choose between two continuations; Trainer's own column filter leaves them alone."""
    model, tuning = tuned(reparam="mlp", hidden=16, condition=SIZE)
    before = base_weights(model)
    options = {"max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 16, "save_strategy": "no"}
    made = trainer(model, tmp_path, signs(128, 0), remove_unused_columns=unused, **options)
    made.train()
    held_out = signs(64, 1)
    condition = torch.stack([e["condition"] for e in held_out])
    said = zoo.logits(model, input_ids=torch.tensor([[7, 8, 9]] * 64), condition=condition)[:, -1]
    right = (said[:, 20] > said[:, 50]) == (condition[:, 0] > 0)
    assert right.float().mean() > 0.85
    assert_base_unchanged(model, before)
    tuning.detach()


def tasked(n=16):
    return [{**row, "task": ("even", "odd")[i % 2]} for i, row in enumerate(rows(n))]


@pytest.mark.parametrize("config", [
    {"reparam": "mlp", "hidden": 8, "condition": SIZE},
    {"reparam": "mlp", "hidden": 8, "share": "layers"},
    {"tasks": ("even", "odd"), "share": "keys"},
    {"tasks": ("even", "odd"), "reparam": "mlp", "hidden": 8, "dropout": 0.1},
])  # fmt: skip
def test_resuming_gives_the_uninterrupted_losses(config, tmp_path):
    data = tasked() if "tasks" in config else signs(16, 0)
    data = data if "tasks" in config or "condition" in config else rows()
    model, tuning = tuned(**config)
    whole = trainer(model, tmp_path / "whole", data)
    whole.train()
    ended = [p.detach().clone() for p in tuning.parameters()]
    tuning.detach()
    model, tuning = tuned(**config)
    resumed = trainer(model, tmp_path / "whole", data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(p, end) for p, end in zip(tuning.parameters(), ended, strict=True))
    assert losses(resumed) == {**losses(resumed), **{k: v for k, v in losses(whole).items() if k > 2}}


def test_a_checkpoint_has_a_folder_for_each_task(tmp_path):
    model, tuning = tuned(tasks=("even", "odd"))
    trainer(model, tmp_path, tasked()).train()
    for task in ("even", "odd"):
        assert fw.Prefix.load(tmp_path / "checkpoint-6" / task) == tuning.bake(task=task)


def test_rows_without_a_task_stop_at_the_first_step(tmp_path):
    model, _ = tuned(tasks=("even", "odd"))
    with pytest.raises(fw.AttachError, match="depends on its task"):
        trainer(model, tmp_path, rows()).train()
