"""Several tasks in one run: the order of rows, resuming, evaluation by task, the penalty, refusals, train_prefix."""

from __future__ import annotations

import io
import math

import pytest
import tiny
import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainerCallback

import foreword as fw
import zoo
from foreword.data import encode, read_examples
from foreword.orthogonal import penalty
from foreword.train.memory_estimate import estimate_memory, longest_batch
from foreword.train.run import train_prefix

TASKS = ("even", "odd", "rare")


def mixture(sizes=(8, 6, 2), **options):
    data = {task: tiny.rows(n, seed=i) for i, (task, n) in enumerate(zip(TASKS, sizes, strict=False))}
    return fw.TaskMixture(data, **options)


def tuned(**config):
    return tiny.tuned(**{"tasks": TASKS, **config})


class Seen(TrainerCallback):
    """The rows of every step, as the model was given them."""

    def __init__(self, model):
        self.rows = []
        self.handle = model.register_forward_pre_hook(self._note, with_kwargs=True, prepend=True)

    def _note(self, model, args, kwargs):
        if torch.is_grad_enabled():
            lengths = kwargs["attention_mask"].sum(1).tolist()
            texts = [ids[:n] for ids, n in zip(kwargs["input_ids"].tolist(), lengths, strict=True)]
            self.rows.append(list(zip(kwargs["task"], texts, strict=True)))


@pytest.mark.parametrize("sampling", ["size", "uniform", "temperature"])
@pytest.mark.parametrize("workers", [0, 1])
def test_rows_come_in_the_mixtures_order(sampling, workers, tmp_path):
    if workers and sampling != "size":
        pytest.skip("once is enough")
    data = mixture(sampling=sampling)
    model, _ = tuned()
    seen = Seen(model)
    made = tiny.trainer(model, tmp_path, data, max_steps=10, save_strategy="no", dataloader_num_workers=workers)
    made.train()
    order = [data[i] for epoch in range(3) for i in data.order(5, epoch)]
    want = [(row["task"], row["input_ids"]) for row in order]
    assert [row for batch in seen.rows for row in batch] == want[:40]  # 16 rows an epoch, batches of 4
    assert any(len({task for task, _ in batch}) > 1 for batch in seen.rows)


def test_data_seed_decides_before_seed(tmp_path):
    orders = []
    for i, seeds in enumerate(({"seed": 1}, {"seed": 1, "data_seed": 7}, {"seed": 2, "data_seed": 7})):
        model, _ = tuned()
        seen = Seen(model)
        tiny.trainer(model, tmp_path / str(i), mixture(), max_steps=4, save_strategy="no", **seeds).train()
        orders.append(seen.rows)
    assert orders[0] != orders[1] == orders[2]


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("config", [
    {"common": 2, "dropout": 0.1}, {"reparam": "mlp", "hidden": 8, "common": 1}, {"reparam": "low-rank", "share": None},
])  # fmt: skip
def test_resuming_in_any_epoch_gives_the_uninterrupted_run(step, config, tmp_path):
    """Steps 1 to 4 are the first epoch, and a run may be broken off at its end, or within the second."""
    options = {"max_steps": 10, "orthogonality": 0.5, "save_total_limit": None}
    data = {"sampling": "temperature", "temperature": 3.0}
    model, tuning = tuned(**config)
    whole = tiny.trainer(model, tmp_path / "whole", mixture(**data), **options)
    whole.train()
    ended = [p.detach().clone() for p in tuning.parameters()]
    tuning.detach()
    model, tuning = tuned(**config)
    seen = Seen(model)
    resumed = tiny.trainer(model, tmp_path / "whole", mixture(**data), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert len(seen.rows) == 10 - step
    assert all(torch.equal(p, end) for p, end in zip(tuning.parameters(), ended, strict=True))
    assert tiny.losses(resumed) == tiny.losses(whole)
    logged = [[e["orthogonality"] for e in made.state.log_history if "orthogonality" in e] for made in (whole, resumed)]
    assert logged[0] == logged[1] and len(logged[0]) == 10


def test_one_run_learns_what_separate_runs_learn(tmp_path):
    """With the same rows at the same steps, a task's prefix is that of a run of its own: nothing else moved it."""
    lone = {"even": tiny.rows(4, seed=0)}
    model, tuning = tiny.tuned(tasks=("even", "odd"))
    start = tuning.bake(task="odd")
    made = tiny.trainer(model, tmp_path / "one", [{**row, "task": "even"} for row in lone["even"]], max_grad_norm=0.0)
    made.train()
    among = tuning.bake(task="even")
    assert tuning.bake(task="odd") == start  # no row, no gradient; AdamW at weight decay 0 leaves it
    tuning.detach()
    model, tuning = tiny.tuned(seed=0)
    tiny.trainer(model, tmp_path / "two", lone["even"], max_grad_norm=0.0).train()
    alone = tuning.bake()
    for site in alone.keys:
        torch.testing.assert_close(among.keys[site], alone.keys[site], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(among.values[site], alone.values[site], atol=1e-6, rtol=1e-5)


def test_a_stage_leaves_the_other_sites_common_tokens_alone(tmp_path):
    model, tuning = tuned(common=2)
    start = {n: p.detach().clone() for n, p in tuning.named_parameters()}
    stages = fw.LayerByLayer([fw.Stage("last:1", 5), fw.Stage("last:1", 1)])
    tiny.trainer(model, tmp_path, mixture(), callbacks=[stages], save_strategy="no").train()
    moved = {n for n, p in tuning.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {f"encoder.{kind}.1" for kind in ("keys", "values", "common_keys", "common_values")}


# ---------------------------------------------------------------- evaluation by task


def test_each_task_is_evaluated_and_the_mean_is_the_loss(tmp_path):
    model, tuning = tuned()
    valid = mixture((3, 4, 2))
    made = tiny.trainer(model, tmp_path, mixture(), valid=valid, eval_strategy="steps", eval_steps=2)
    made.train()
    found = made.evaluate()
    losses = {task: found[f"eval_{task}_loss"] for task in TASKS}
    assert found["eval_loss"] == pytest.approx(sum(losses.values()) / 3)
    logged = [e for e in made.state.log_history if "eval_loss" in e]
    assert [e["step"] for e in logged] == [2, 4, 6, 6] and logged[-1]["eval_loss"] == found["eval_loss"]
    assert made.evaluate(valid)["eval_loss"] == found["eval_loss"]
    assert made.evaluate(valid.parts["odd"], metric_key_prefix="test")["test_loss"] == losses["odd"]
    baked = {task: tuning.bake(task=task) for task in TASKS}
    tuning.detach()
    for task, prefix in baked.items():
        fw.attach(model, prefix)
        batch = made.data_collator([{k: v for k, v in row.items() if k != "task"} for row in valid.parts[task]])
        with torch.no_grad():
            assert float(model(**batch).loss) == pytest.approx(losses[task], abs=1e-5)
        fw.tuning.tuning_of(model).detach()


def test_the_best_model_is_the_best_mean(tmp_path):
    model, tuning = tuned()
    options = {"load_best_model_at_end": True, "learning_rate": 3.0, "eval_strategy": "steps", "eval_steps": 1,
               "save_steps": 1, "warmup_steps": 3}  # fmt: skip
    made = tiny.trainer(model, tmp_path, mixture(), valid=mixture((3, 4, 2)), explode_factor=1e9, **options)
    made.train()
    means = {e["step"]: e["eval_loss"] for e in made.state.log_history if "eval_loss" in e}
    best = min(means, key=means.get)
    assert made.state.best_metric == means[best] and made.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert best < 6 and fw.Prefix.load(tmp_path / f"checkpoint-{best}" / "odd") == tuning.bake(task="odd")


def test_callbacks_hear_of_the_mean_once(tmp_path):
    """Growth and early stopping go by it."""
    model, _ = tuned(length=6, common=2)
    growth = fw.Growth(start=3, step=2, threshold=10.0, settle=1)
    stopping = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1e9)
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    made = tiny.trainer(model, tmp_path, mixture(), valid=mixture((3, 4, 2)), callbacks=[growth, stopping],
                        max_steps=9, **options)  # fmt: skip
    made.train()
    grown = [(e["step"], e["prefix_length"]) for e in made.state.log_history if "prefix_length" in e]
    assert grown == [(2, 5), (3, 6)] and made.state.global_step == 3  # the first is the best; two more are not better


# ---------------------------------------------------------------- the penalty


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_penalty_adds_its_gradient_once_a_step(accumulate, tmp_path):
    """Whatever the accumulation: against the plain run's gradient and autograd's of the penalty."""
    gradients, logs = {}, {}
    for strength in (0.0, 5.0):
        model, tuning = tuned(common=1)
        options = {"max_steps": 1, "max_grad_norm": 0.0, "gradient_accumulation_steps": accumulate,
                   "save_strategy": "no", "per_device_train_batch_size": 2, "orthogonality": strength}  # fmt: skip
        made = tiny.trainer(
            model, tmp_path / f"{strength}", mixture(), callbacks=[kept := Gradients(tuning)], **options
        )
        if strength:
            shared = penalty(tuning.encoder, 3)
            added = torch.autograd.grad(shared, list(tuning.parameters()), allow_unused=True)
            shared = float(shared.detach())
            estimate_memory(made)  # runs the loss, which is not to be logged
        made.train()
        gradients[strength], logs[strength] = kept.found, made.state.log_history[0]
    for plain, with_it, more in zip(gradients[0.0], gradients[5.0], added, strict=True):
        torch.testing.assert_close(with_it, plain + 5 * (more if more is not None else 0), atol=1e-6, rtol=1e-4)
    assert max(m.abs().max() for m in added if m is not None) > 1e-4
    assert logs[5.0]["orthogonality"] == pytest.approx(shared) and "orthogonality" not in logs[0.0]
    assert logs[5.0]["loss"] == pytest.approx(logs[0.0]["loss"] + 5 * shared, abs=1e-4)


class Gradients(TrainerCallback):
    def __init__(self, tuning):
        self.tuning = tuning

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.found = [p.grad.clone() for p in self.tuning.parameters()]


def test_a_strong_penalty_takes_tasks_apart_and_evaluation_leaves_it_out(tmp_path):
    shared, evaluated = {}, {}
    for strength in (0.0, 50.0):
        model, tuning = tuned()
        made = tiny.trainer(model, tmp_path / f"{strength}", mixture(), valid=mixture(), max_steps=40,
                            save_strategy="no", orthogonality=strength, learning_rate=0.1)  # fmt: skip
        evaluated[strength] = made.evaluate()["eval_loss"]
        made.train()
        shared[strength] = float(penalty(tuning.encoder, 3).detach())
    assert shared[50.0] < shared[0.0] / 5 and evaluated[0.0] == evaluated[50.0]


# ---------------------------------------------------------------- refusals


def refused(message, data, error=fw.ConfigError, valid=None, config=None, **arguments):
    model, _ = tiny.tuned(**(config if config is not None else {"tasks": TASKS}))
    with pytest.raises(error, match=message):
        tiny.trainer(model, "never", data, valid=valid, **arguments)


def test_what_does_not_fit_is_refused_before_training():
    refused("the task 'rare' has no examples: the mixture has even, odd; add a data set", mixture((4, 4)))
    refused(r"the mixture to train on has the task 'rare'.*its tasks are even, odd", mixture(),
            config={"tasks": ("even", "odd")})  # fmt: skip
    refused("it has no tasks.*PrefixConfig\\(tasks=\\('even', 'odd', 'rare'\\)\\)", mixture(), config={})
    refused("the mixture to evaluate on has the task 'rare'", mixture((4, 4)), valid=mixture(),
            config={"tasks": ("even", "odd")})  # fmt: skip
    refused("a TaskMixture draws its examples itself", mixture(), train_sampling_strategy="group_by_length")
    refused("orthogonality=0.1 keeps the prefixes of several tasks apart, and this one has none", tiny.rows(),
            config={}, orthogonality=0.1)  # fmt: skip
    refused("this one has only 'even'", mixture((4,)), config={"tasks": ("even",)}, orthogonality=0.1)
    for bad in (-1.0, math.inf, math.nan):
        refused("expected 0 \\(no penalty\\) or a positive strength", mixture(), orthogonality=bad)


# ---------------------------------------------------------------- train_prefix


def run(model, out, *, config=None, data=None, valid=None, resume=False, callbacks=(), **arguments):
    tokenizer = zoo.tokenizer()
    settings = {"max_steps": 6, "per_device_train_batch_size": 3, "save_steps": 2, "logging_steps": 1, "use_cpu": True,
                "report_to": "none", "eval_steps": 3, **arguments}  # fmt: skip
    config = (
        config if config is not None else fw.PrefixConfig(length=4, init="random", tasks=("film", "food"), common=1)
    )
    return train_prefix(model, tokenizer, config, data if data is not None else texts(), out, settings, valid=valid,
                        resume=resume, callbacks=callbacks, console=Console(file=io.StringIO()))  # fmt: skip


def texts(tasks=("film", "food")):
    sets = {}
    for i, task in enumerate(tasks):
        examples = read_examples([{"text": s} for s in zoo.SENTENCES[i:] * 2])
        sets[task] = encode(examples, zoo.tokenizer(), max_length=40)
    return fw.TaskMixture(sets, sampling="uniform")


def test_a_run_saves_a_folder_for_each_task(tmp_path):
    model, out = zoo.build("llama"), tmp_path / "out"
    before = tiny.base_weights(model)
    result = run(model, out, valid=texts(), orthogonality=0.1)
    assert fw.tuning.tuning_of(model) is None
    tiny.assert_base_unchanged(model, before)
    assert {p.name for p in out.iterdir()} == {"film", "food", "curve.png", "checkpoint-4", "checkpoint-6"}
    last = {k: v for e in result.history for k, v in e.items()}
    for task in ("film", "food"):
        prefix = fw.Prefix.load(out / task)
        assert prefix == result.prefixes[task] and prefix.metadata["task"] == task
        assert prefix.metadata["metrics"] == {"loss": last["loss"], "eval_loss": last[f"eval_{task}_loss"]}
        assert prefix.metadata["training"]["eval_loss"] == last["eval_loss"]
        fw.attach(model, prefix).detach()
    assert last["orthogonality"] > 0
    with pytest.raises(fw.ConfigError, match=r"take one of them: prefixes\['film'\]"):
        result.prefix  # noqa: B018
    with pytest.raises(fw.ConfigError, match=r"film holds a prefix already; choose another --out"):
        run(model, out)
    assert run(model, out, resume=True, max_steps=8).steps == 8
    (tmp_path / "notes" / "film").mkdir(parents=True)
    (tmp_path / "notes" / "film" / "README.md").write_text("mine")
    with pytest.raises(fw.ConfigError, match=r"film holds a README\.md of something else"):
        run(model, tmp_path / "notes")


def test_a_run_refuses_before_it_begins(tmp_path):
    model, out = zoo.build("llama"), tmp_path / "out"
    several = fw.PrefixConfig(length=4, init="random", tasks=("film", "food"))
    one = texts(("film",)).parts["film"].rows
    with pytest.raises(
        fw.ConfigError, match=r"trains several prefixes, and the data are one set; .*TaskMixture\(\{'film'"
    ):
        run(model, out, config=several, data=one)
    with pytest.raises(fw.ConfigError, match="the data are one set"):
        run(model, out, config=several, valid=one)
    with pytest.raises(fw.ConfigError, match="'food' has no examples"):
        run(model, out, config=several, data=texts(("film",)))
    with pytest.raises(fw.ConfigError, match="it has no tasks"):
        run(model, out, config=fw.PrefixConfig(length=4, init="random"))
    for name in ("runs", "checkpoint-3", "last-good"):
        config = fw.PrefixConfig(length=4, init="random", tasks=(name, "food"))
        with pytest.raises(fw.ConfigError, match=f"can't be named '{name}'"):
            run(model, out, config=config, data=texts((name, "food")))
    assert not (out / "film").exists() and fw.tuning.tuning_of(model) is None


def test_the_memory_estimate_is_that_of_a_mixed_batch(tmp_path):
    """Rows of one task share a prefix; a mixed batch has copies of it, and so has what is measured."""
    model, _ = tuned(length=20)
    data = mixture((9, 2, 2))
    made = tiny.trainer(model, tmp_path, data, per_device_train_batch_size=6)
    batch = longest_batch(made)
    assert len(set(batch["task"][:2])) == 2 and batch["input_ids"].shape == (6, 7)
    alone = {**batch, "task": [batch["task"][0]] * 6}
    assert estimate_memory(made).step > estimate_memory(made, alone).step
