"""What is divergence and what is not: steps that fp16 passes over, hard rows after easy ones, and the real thing."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
import transformers
from accelerate.state import AcceleratorState
from torch.utils.data import SequentialSampler

import foreword as fw
import zoo
from foreword.data import Collator, encode, read_examples
from foreword.train.checkpoints import damage
from foreword.train.watch import Watch, risen_loss


@pytest.fixture
def fresh_state():
    """accelerate keeps the precision of the last run for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def in_fp16(trainer, scale=65536.0, growth=5):
    """What fp16=True sets up on a GPU; there the scale grows every 2000 steps."""
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return trainer


def fp16_run(kind, out, *, callbacks=(), **arguments):
    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    model, tuning = tiny.tuned()
    settings = {"output_dir": str(out), "max_steps": 30, "per_device_train_batch_size": 4, "logging_steps": 1,
                "save_strategy": "no", "learning_rate": 0.02, **tiny.QUIET, **arguments}  # fmt: skip
    trainer = in_fp16(
        kind(model, transformers.TrainingArguments(**settings), train_dataset=tiny.rows(), data_collator=Collator(0),
             callbacks=[c(tuning) for c in callbacks])
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class Overflow(transformers.TrainerCallback):
    """Gradients that aren't finite at some steps."""

    steps: tuple[int, ...] = ()

    def __init__(self, tuning):
        self.tuning, self.handles = tuning, []

    def on_step_begin(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()
        if state.global_step in self.steps:
            self.handles = [p.register_hook(lambda g: g * math.inf) for p in self.tuning.parameters()]


def overflow(*steps):
    return type("OverflowAt", (Overflow,), {"steps": steps})


@pytest.mark.usefixtures("fresh_state")
@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_fp16_skips_is_skipped_as_in_trainer(clip, accumulate, tmp_path):
    runs = []
    for kind in (fw.PrefixTrainer, transformers.Trainer):
        made = fp16_run(kind, tmp_path, callbacks=[overflow(3, 12, 13, 20)], max_grad_norm=clip,
                        gradient_accumulation_steps=accumulate)  # fmt: skip
        made.train()
        skipped = [e["step"] for e in made.state.log_history if not math.isfinite(e.get("grad_norm", 0.0))]
        assert {4, 13, 14, 21} <= set(skipped) and made.state.global_step == 30
        runs.append((skipped, tiny.losses(made), [p.detach().clone() for p in made.model.foreword.parameters()]))
    (a, b, ours), (c, d, theirs) = runs
    assert a == c and b == pytest.approx(d) and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("fresh_state")
def test_a_scale_that_falls_and_falls_ends_the_run(tmp_path):
    made = fp16_run(fw.PrefixTrainer, tmp_path, callbacks=[overflow(*range(2, 99))], max_steps=99)
    said = r"step 30: no gradient of the last 28 steps is finite, .*loss scale of fp16 fell from 65536 to 0.000"
    with pytest.raises(fw.DivergedError, match=said):
        made.train()
    assert fw.Prefix.load(tmp_path / "last-good").longest == 4


@pytest.mark.usefixtures("fresh_state")
@pytest.mark.parametrize("back", [False, True])
def test_a_loss_that_is_not_finite_is_divergence_in_fp16_too(back, tmp_path):
    callbacks = [lambda tuning: fw.RollBack(every=2)] if back else []
    made = fp16_run(fw.PrefixTrainer, tmp_path, callbacks=callbacks, max_steps=8)
    spoiled = made.compute_loss

    def compute_loss(*args, **kwargs):
        loss = spoiled(*args, **kwargs)
        return loss * math.nan if made.state.global_step == 4 else loss

    made.compute_loss = compute_loss
    if not back:
        with pytest.raises(fw.DivergedError, match="step 5: the loss is nan"):
            made.train()
        return
    with pytest.warns(UserWarning, match="the loss is nan at step 5: went back to step"):
        made.train()
    assert made.state.global_step == 8 and all(torch.isfinite(p).all() for p in made.tuning.parameters())


@pytest.mark.usefixtures("fresh_state")
def test_a_copy_whose_gradient_was_skipped_is_not_thought_well(tmp_path):
    recovery = fw.RollBack(every=5)
    kept = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(recovery._good[0])

    made = fp16_run(fw.PrefixTrainer, tmp_path, callbacks=[lambda t: recovery, overflow(5), lambda t: Look()],
                    max_steps=8)  # fmt: skip
    made.train()
    assert kept == [0, 0, 0, 0, 0, 0, 5, 5]  # judged in the seventh step, the sixth having been skipped


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_hard_row_after_easy_ones_is_no_explosion(clip, tmp_path):
    """The gradient is ordinary, and thousands of times what it was while the easy rows were known by heart."""
    tok = zoo.tokenizer()

    def row(given, output, **options):
        return encode(read_examples([{"input": given, "output": output}]), tok, max_length=32, **options)[0]

    data = [row("The film is", "a", eos=False)] * 420 + [row("There is a place", " not for families")] * 4

    def run(kind):
        class InOrder(kind):
            def _get_train_sampler(self, *args, **kwargs):
                return SequentialSampler(self.train_dataset)

        torch.manual_seed(0)
        model = zoo.build("llama")
        fw.attach(model, fw.PrefixConfig(length=16, init="Write a glowing review", repeat=True), tokenizer=tok)
        args = fw.PrefixTrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=2, logging_steps=1,
            save_strategy="no", learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=clip, **tiny.QUIET,
        )  # fmt: skip
        made = InOrder(model, args, train_dataset=data, data_collator=Collator.for_tokenizer(tok))
        made.remove_callback(transformers.PrinterCallback)
        made.train()
        return [e["grad_norm"] for e in made.state.log_history if "grad_norm" in e], tiny.losses(made)

    (norms, losses), (theirs, expected) = run(fw.PrefixTrainer), run(transformers.Trainer)
    assert len(losses) == 212 and losses == pytest.approx(expected) and norms == pytest.approx(theirs)
    assert norms[-2] > 1000 * norms[-3]


def test_what_is_usual():
    """The largest of the median of the last 50, the largest of the first ten, and the clip."""
    watch = Watch(factor=1000.0, clip=1.0)
    assert not any(watch.wrong_with(n) for n in [0.5, 3.0, *[0.1] * 8])
    for _ in range(100):
        assert not watch.wrong_with(1e-6)
    assert not watch.wrong_with(2999.0) and not watch.wrong_with(1e-6)
    assert watch.wrong_with(3001.0) == "the gradient's norm is 3e+03, 1000 times the usual 3"
    again = Watch(factor=1000.0, clip=1.0)
    again.load(watch.tensors())
    assert again.early == 3.0 and again.norms == watch.norms and again.wrong_with(3001.0)

    small = Watch(factor=1000.0, clip=1.0)
    assert not any(small.wrong_with(1e-3) for _ in range(10))
    assert not small.wrong_with(999.0) and small.wrong_with(1001.0)
    free = Watch(factor=1000.0, clip=0.0)
    assert not any(free.wrong_with(1e-3) for _ in range(10))
    assert not free.wrong_with(0.9) and free.wrong_with(1.1)
    assert free.wrong_with(math.nan) == "the gradient's norm is nan"


def test_a_loss_that_rose_is_told(tmp_path):
    assert risen_loss([{"loss": n} for n in (5.0, 6.0, 7.0, 8.0)]) == "the training loss rose from 5 to 8"
    assert risen_loss([{"loss": n} for n in (5.0, 9.0, 9.0, 9.0, 5.0, 4.0, 5.0, 6.0)]) == ""  # within a tenth
    assert risen_loss([{"loss": 1.0}, {"eval_loss": 2.0}, {"loss": 3.0}, {"loss": 9.0}]) == ""  # too short a log
    model, _ = tiny.tuned()
    made = tiny.trainer(model, tmp_path, max_steps=12, save_strategy="no")
    loss = made.compute_loss
    made.compute_loss = lambda *a, **k: loss(*a, **k) * (2 if made.state.global_step > 8 else 1)
    with pytest.warns(UserWarning, match=r"the training loss rose from .*; try a third of the learning rate"):
        made.train()


def test_unclipped_gradients_are_watched_as_well(tmp_path):
    model, tuning = tiny.tuned()

    class Spike(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 12:
                for parameter in tuning.parameters():
                    parameter.register_hook(lambda grad: grad * 1e4)

    made = tiny.trainer(model, tmp_path, callbacks=[Spike()], max_steps=20, max_grad_norm=0.0)
    with pytest.raises(fw.DivergedError, match=r"step 13: the gradient's norm is \S+, 1000 times the usual"):
        made.train()


def test_the_prefix_is_copied_once_a_step(tmp_path, monkeypatch):
    """Accumulated passes have the same parameters."""
    model, tuning = tiny.tuned()
    copies = []
    parameters = tuning.parameters
    monkeypatch.setattr(tuning, "parameters", lambda: copies.append(1) or parameters())
    made = tiny.trainer(model, tmp_path, gradient_accumulation_steps=4, max_steps=3, save_strategy="no")
    copies.clear()
    made.train()
    assert len(copies) == 3


@pytest.mark.usefixtures("fresh_state")
def test_a_sites_norm_is_without_the_loss_scale(tmp_path):
    found = []
    for scale in (1.0, 1024.0):
        made = fp16_run(fw.PrefixTrainer, tmp_path / str(scale), callbacks=[lambda t: fw.Monitor(every=1), overflow(2)],
                        max_steps=3)  # fmt: skip
        in_fp16(made, scale).train()
        looks = [json.loads(line) for line in (tmp_path / str(scale) / "monitor.jsonl").read_text().splitlines()]
        found.append([[site["gradient_norm"] for site in look["sites"].values()] for look in looks])
    assert found[1][2] == [None, None] and all(n is None or 1e-3 < n < 10 for look in found[1] for n in look)
    assert found[1][:2] == [pytest.approx(look, rel=0.02) for look in found[0][:2]]


@pytest.mark.usefixtures("fresh_state")
def test_the_loss_scale_is_in_the_checkpoint(tmp_path):
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "seed": 3}
    whole = fp16_run(fw.PrefixTrainer, tmp_path, **arguments)
    whole.train()
    scale = whole.accelerator.scaler.get_scale()
    folder = tmp_path / "checkpoint-4"
    resumed = fp16_run(fw.PrefixTrainer, tmp_path, **arguments)
    resumed.train(str(folder))
    assert tiny.losses(resumed) == tiny.losses(whole) and resumed.accelerator.scaler.get_scale() == scale
    AcceleratorState._reset_state(True)
    model, _ = tiny.tuned()
    tiny.trainer(model, tmp_path, max_steps=8).train(str(folder))  # in 32 bits now
    assert damage(folder) == ""
    noted = json.loads((folder / "training_args.json").read_text())
    (folder / "training_args.json").write_text(json.dumps({**noted, "fp16": True}))
    assert damage(folder) == ""
    (folder / "scaler.pt").unlink()
    assert damage(folder) == "it has no scaler.pt"
