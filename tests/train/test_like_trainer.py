"""PrefixTrainer does what transformers' Trainer does with the arguments that users set: same losses, rates, parameters.

Where it differs by design the case says so: ``differs`` has the arguments of the other side that make the two alike, or
the case is among the refusals at the end.
"""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
import transformers

import foreword as fw
import zoo
from foreword.data import Collator

# What the two are compared on; every entry of the log that is not a time is.
TIMES = ("runtime", "per_second")
PREFIX = [fw.PrefixConfig(length=4, init="random", gate="head")]  # the gate's name has `bias` in it: not decayed


def accuracy(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    logits = logits[0] if isinstance(logits, tuple) else logits
    chosen = logits if logits.ndim == 2 else logits.argmax(-1)
    kept = labels[:, 1:] != -100
    return {"accuracy": float((chosen[:, :-1] == labels[:, 1:])[kept].mean())}


def chosen_tokens(logits, labels):
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def summed(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1).float()
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else 1)


def run(kind, out, *, what=PREFIX, name="llama", given=None, make=None, after=None, resume=None, **arguments):
    """Train five steps; the log, what the optimizer's groups were, and the trained numbers."""
    torch.manual_seed(0)
    model = zoo.build(name)
    tuning = fw.attach(model, what)
    settings = {"output_dir": str(out), "max_steps": 5, "per_device_train_batch_size": 4, "logging_steps": 1,
                "save_strategy": "no", "learning_rate": 0.02, "seed": 5, **tiny.QUIET, **arguments}  # fmt: skip
    given = {"train_dataset": tiny.rows(), "eval_dataset": tiny.rows(6, seed=1), **(given or {})}
    given |= make(tuning) if make is not None else {}
    collator = Collator(0, seq2seq=model.config.is_encoder_decoder)
    trainer = kind(model, transformers.TrainingArguments(**settings), data_collator=collator, **given)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume)
    if after is not None:
        after(trainer)
    log = [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in trainer.state.log_history]
    return log, {n: p.detach().clone() for n, p in tuning.named_parameters()}, trainer


def same(ours, theirs):
    """Both runs logged the same numbers and ended with the same parameters."""
    for own, other in zip(ours[0], theirs[0], strict=True):
        assert own == pytest.approx(other, rel=1e-5, abs=1e-7, nan_ok=True)
    assert ours[1].keys() == theirs[1].keys()
    for name, number in theirs[1].items():
        assert torch.allclose(ours[1][name], number, atol=1e-6), name
    assert any("loss" in entry for entry in theirs[0])


DATA = tiny.rows(14)
CASES = {
    # how far and how fast
    "nothing else": {},
    "epochs": {"max_steps": -1, "num_train_epochs": 1.5},
    "batch size": {"per_device_train_batch_size": 3},
    "warm-up steps": {"warmup_steps": 3},
    "warm-up share": {"warmup_steps": 0.5},
    "learning rate 0": {"learning_rate": 0.0},
    "another rate": {"learning_rate": 0.3},
    # the step
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation, cut off": {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2},
    "tokens by device": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
    "clipped hard": {"max_grad_norm": 0.01},
    "not clipped": {"max_grad_norm": 0.0},
    "weight decay": {"weight_decay": 0.5},
    "smoothed labels": {"label_smoothing_factor": 0.2},
    "noise on embeddings": {"neftune_noise_alpha": 5.0},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "full determinism": {"full_determinism": True},
    "cache on": {"use_cache": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "cache emptied": {"torch_empty_cache_steps": 1},
    # the optimizer
    "adamw_torch": {"optim": "adamw_torch", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-4},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor"},
    "rmsprop": {"optim": "rmsprop"},
    "adagrad": {"optim": "adagrad"},
    "optimizer_cls_and_kwargs": {"given": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})}},
    "… decayed": {"given": {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 0.1})}, "weight_decay": 0.3},
    "… with a floor": {
        "given": {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 0.1})},
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 0.05},
    },
    "an optimizer": {"make": lambda t: {"optimizers": (torch.optim.SGD(t.parameters(), 0.4), None)}},
    "optimizer and schedule": {
        "make": lambda t: {
            "optimizers": (o := torch.optim.AdamW(t.parameters(), 0.1), torch.optim.lr_scheduler.StepLR(o, 2, 0.5))
        }
    },
    # the order of the data
    "other seed": {"seed": 11},
    "seed of the data": {"data_seed": 11},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "in order": {"train_sampling_strategy": "sequential"},
    "last batch dropped": {"dataloader_drop_last": True, "given": {"train_dataset": DATA}, "max_steps": 8},
    "a worker": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
    "unused columns": {"remove_unused_columns": True},
    # what is logged and looked at
    "first step logged": {"logging_steps": 2, "logging_first_step": True},
    "logged by epoch": {"logging_strategy": "epoch"},
    "tokens counted": {"include_num_input_tokens_seen": "non_padding"},
    "no filter": {"logging_nan_inf_filter": False},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    "evaluated by epoch": {"eval_strategy": "epoch", "per_device_eval_batch_size": 2, "eval_delay": 1},
    "metrics": {"eval_strategy": "steps", "eval_steps": 2, "given": {"compute_metrics": accuracy}},
    "metrics of chosen tokens": {
        "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2, "eval_accumulation_steps": 1,
        "given": {"compute_metrics": accuracy, "preprocess_logits_for_metrics": chosen_tokens},
    },
    "losses only": {"eval_strategy": "steps", "eval_steps": 2, "prediction_loss_only": True},
    "loss function": {"given": {"compute_loss_func": summed}, "gradient_accumulation_steps": 2},
    "batch size found": {"auto_find_batch_size": True},
    "best at the end": {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.5,
        "load_best_model_at_end": True, "save_total_limit": 1,
    },
    "best saved": {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best",
                   "metric_for_best_model": "loss", "load_best_model_at_end": True, "learning_rate": 0.5},
}  # fmt: skip

SCHEDULES = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 0.002, "power": 2.0},
    "cosine_with_min_lr": {"min_lr": 0.002},
    "cosine_warmup_with_min_lr": {"min_lr": 0.002, "warmup_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3, "min_lr_ratio": 0.2},
    "inverse_sqrt": {"timescale": 2},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 0, "threshold": 10.0, "min_lr": 0.004},
    "greedy": {"factor": 0.5, "patience": 0, "min_lr": 0.004},
}
WATCHED = ("reduce_lr_on_plateau", "greedy")  # step with each evaluation


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:learning_rate=0 hardly")
def test_arguments_do_what_they_do_in_trainer(case, tmp_path):
    runs = [run(kind, tmp_path / kind.__name__, **CASES[case]) for kind in (fw.PrefixTrainer, transformers.Trainer)]
    same(*runs)
    if case == "learning rate 0":
        start = run(fw.PrefixTrainer, tmp_path / "start", max_steps=1, learning_rate=0.0)[1]
        assert all(torch.equal(start[name], number) for name, number in runs[0][1].items())


def schedule(name, rate=0.02):
    kwargs = SCHEDULES.get(name)
    watched = {"eval_strategy": "steps", "eval_steps": 1} if name in WATCHED else {}
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "warmup_steps": 2, "max_steps": 8, **watched}


@pytest.mark.parametrize("name", [s.value for s in transformers.SchedulerType])
def test_every_schedule_is_trainers(name, tmp_path):
    runs = [run(k, tmp_path / k.__name__, **schedule(name)) for k in (fw.PrefixTrainer, transformers.Trainer)]
    same(*runs)
    rates = [e["learning_rate"] for e in runs[0][0] if "learning_rate" in e]
    assert len(rates) == 8 and (len(set(rates)) > 1) == (name != "constant")


class Rates(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([g["lr"] for g in optimizer.param_groups])


@pytest.mark.parametrize("name", [s.value for s in transformers.SchedulerType])
def test_each_methods_rate_falls_by_the_same_share(name, tmp_path):
    """Absolute rates of a schedule (a floor, an end) are those of the first method."""
    watch, what = Rates(), [fw.PrefixConfig(length=3, init="random"), fw.LoRAConfig(rank=2)]
    run(fw.PrefixTrainer, tmp_path, what=what, given={"callbacks": [watch]}, **schedule(name))
    assert len(watch.seen) == 8 and all(len(rates) == 2 for rates in watch.seen)
    for first, second in watch.seen:
        assert second == pytest.approx(first * 3e-3 / 0.02, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("cosine_with_min_lr", {"min_lr": 0.5}, r"falls to min_lr=0.5, which is above the learning rate 0.02"),
        ("polynomial", {"lr_end": 0.5}, r"falls to lr_end=0.5, which is above"),
        ("reduce_lr_on_plateau", {"min_lr": 0.5}, r"falls to min_lr=0.5, which is above"),
        ("cosine_with_min_lr", {}, r"can't be made with .*One of min_lr or min_lr_rate should be set"),
        ("cosine", {"no_such": 1}, r"can't be made with .*no_such"),
    ],
)
def test_a_schedule_that_can_not_be_is_refused(name, kwargs, said, tmp_path):
    arguments = schedule("reduce_lr_on_plateau") if name == "reduce_lr_on_plateau" else {}
    arguments |= {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs}
    with pytest.raises(fw.ConfigError, match=said):
        run(fw.PrefixTrainer, tmp_path, **arguments)


def test_a_floor_below_a_rate_of_0_is_refused(tmp_path):
    arguments = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.0}}
    with pytest.warns(UserWarning, match="learning_rate=0"), pytest.raises(fw.ConfigError, match="learning rate is 0"):
        run(fw.PrefixTrainer, tmp_path, learning_rate=0.0, **arguments)


def test_weight_decay_leaves_out_what_trainer_leaves_out(tmp_path):
    *_, trainer = run(fw.PrefixTrainer, tmp_path, weight_decay=0.5)
    decays = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    named = {name: decays[id(p)] for name, p in trainer.tuning.named_parameters()}
    assert {n: d for n, d in named.items() if n.startswith("bias.")} == {"bias.0": 0.0, "bias.1": 0.0}
    assert all(d == 0.5 for n, d in named.items() if not n.startswith("bias."))


def test_an_optimizer_without_a_rate_gets_the_arguments(tmp_path):
    """Trainer would take the class's own default, whatever the arguments say."""
    given = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"betas": (0.8, 0.9)})}
    log, _, trainer = run(fw.PrefixTrainer, tmp_path, given=given)
    assert trainer.optimizer.param_groups[0]["betas"] == (0.8, 0.9) and log[0]["learning_rate"] == 0.02


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    def make(tuning):
        return {"optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], 0.1), None)}

    with pytest.raises(fw.ConfigError, match="holds none of the parameters that are to be trained"):
        run(fw.PrefixTrainer, tmp_path, make=make)

    def half(tuning):
        return {"optimizers": (torch.optim.SGD(list(tuning.parameters())[:1], 0.1), None)}

    with pytest.warns(UserWarning, match=r"leaves out \d of \d parameters"):
        run(fw.PrefixTrainer, tmp_path, make=half)


def test_a_factory_of_optimizers(tmp_path):
    class Factory:
        def __call__(self, model, lr):
            return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)

    given = {"optimizer_cls_and_kwargs": (Factory, {"lr": 0.3})}
    same(*[run(k, tmp_path / k.__name__, given=given) for k in (fw.PrefixTrainer, transformers.Trainer)])


def test_what_is_recorded_is_the_rate_that_was_used(tmp_path):
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})}
    *_, trainer = run(fw.PrefixTrainer, tmp_path, given=given)
    trainer.save_model(tmp_path / "saved")
    assert fw.Prefix.load(tmp_path / "saved").metadata["training"]["learning_rate"] == 0.5


def test_resuming_from_a_path_goes_on_as_trainer_does(tmp_path):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    folder = tmp_path / "PrefixTrainer"
    run(fw.PrefixTrainer, folder, **arguments)
    # Not interrupted: in the checkpoints of a plain Trainer there is the base and no prefix, as a warning says.
    resumed = run(fw.PrefixTrainer, folder, resume=str(folder / "checkpoint-4"), **arguments)
    whole = run(transformers.Trainer, tmp_path / "Trainer", **arguments)
    same(*[(log[:-1], *rest) for log, *rest in (resumed, whole)])  # the last line is a mean over the steps of a run
    state = json.loads((tmp_path / "PrefixTrainer/checkpoint-6/trainer_state.json").read_text())
    assert state["global_step"] == 6 and len(list((tmp_path / "PrefixTrainer").glob("checkpoint-*"))) == 3


def test_old_checkpoints_go(tmp_path):
    run(fw.PrefixTrainer, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_batches_that_find_their_size(tmp_path):
    """Out of memory at once: both make the batch a tenth smaller, and train with it."""

    class Full(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not self.told:
                self.told.append(1)
                raise RuntimeError("CUDA out of memory. Tried to allocate")

        def __init__(self):
            self.told = []

    runs = []
    for kind in (fw.PrefixTrainer, transformers.Trainer):
        given = {"callbacks": [Full()]}
        runs.append(run(kind, tmp_path / kind.__name__, given=given, auto_find_batch_size=True))
        assert runs[-1][2]._train_batch_size == 3
    same(*runs)


def test_evaluating_in_half_precision_leaves_the_prefix_as_it_is(tmp_path):
    """By design: Trainer would leave all that is trained rounded to bf16."""
    _, trained, trainer = run(fw.PrefixTrainer, tmp_path, bf16_full_eval=True)
    before = {n: p.clone() for n, p in trained.items()}
    found = trainer.evaluate()
    assert math.isfinite(found["eval_loss"]) and next(trainer.model.model.parameters()).dtype == torch.bfloat16
    for name, parameter in trainer.tuning.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])


def test_uploading_is_the_prefixs_own(tmp_path):
    *_, trainer = run(fw.PrefixTrainer, tmp_path)
    with pytest.raises(fw.ConfigError, match=r"upload the prefix .*tuning.bake\(\).push_to_hub"):
        trainer.push_to_hub()


@pytest.mark.parametrize("what", ["cp", "sp"])
def test_sequences_are_not_divided_among_processes(what, tmp_path):
    model, _ = tiny.tuned()
    args = transformers.TrainingArguments(output_dir=str(tmp_path), learning_rate=0.02, **tiny.QUIET)
    args.parallelism_config = type("Parallel", (), {f"{what}_enabled": True})()
    with pytest.raises(fw.ConfigError, match=rf"divides each sequence among processes \({what}\)"):
        fw.PrefixTrainer(model, args, train_dataset=tiny.rows())


# ---------------------------------------------------------------- refused, in words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"push_to_hub": True}, r"push_to_hub=True is not for PrefixTrainer: .* tuning.bake\(\).push_to_hub"),
        ({"fsdp": True}, "FSDP would shard the prefix"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0; expected 0 or a positive number"),
        ({"learning_rate": math.nan}, "learning_rate=nan; expected 0 or a positive number"),
        ({"learning_rate": math.inf}, "learning_rate=inf; expected 0 or a positive number"),
    ],
)
def test_arguments_that_are_refused(arguments, said, tmp_path):
    with pytest.raises(fw.ConfigError, match=said):
        run(fw.PrefixTrainer, tmp_path, **arguments)
