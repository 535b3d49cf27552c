"""PrefixTrainer: what it saves, that it resumes exactly, and that it stops when training diverges."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
import torch
import transformers

import foreword as fw
import zoo
from foreword.data import Collator
from foreword.methods import LEARNING_RATES
from foreword.train.trainer import STATE, WATCH, last_checkpoint

WAYS = {"direct": {}, "mlp": {"reparam": "mlp", "hidden": 16}, "low-rank": {"reparam": "low-rank", "rank": 2}}


def plain_arguments(out, **changes):
    settings = {"output_dir": str(out), "max_steps": 12, "per_device_train_batch_size": 4, "save_strategy": "no"}
    return transformers.TrainingArguments(**{**settings, **tiny.QUIET, **changes})


def newest(out):
    return max(out.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))


# ---------------------------------------------------------------- what it takes


@pytest.mark.parametrize("state", ["bare", "frozen", "detached"])
def test_it_needs_a_trainable_prefix(state, tmp_path):
    model, tuning = tiny.tuned()
    prefix = tuning.bake()
    tuning.detach()
    if state == "frozen":
        fw.attach(model, prefix)
    with pytest.raises(fw.AttachError, match="no trainable one; attach one first"):
        tiny.trainer(model, tmp_path)


@pytest.mark.parametrize("reparam", ["direct", "low-rank", "mlp"])
def test_the_learning_rate_suits_what_is_trained(reparam, tmp_path):
    model, _ = tiny.tuned(**WAYS[reparam])
    assert tiny.trainer(model, tmp_path).args.learning_rate == LEARNING_RATES[reparam]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert tiny.trainer(model, tmp_path, learning_rate=3e-3).args.learning_rate == 3e-3


def test_a_learning_rate_for_whole_models_is_warned_of(tmp_path):
    model, _ = tiny.tuned()
    with pytest.warns(UserWarning, match="learning_rate=5e-05 hardly moves a prefix; 0.02 is usual"):
        fw.PrefixTrainer(model, plain_arguments(tmp_path), train_dataset=tiny.rows())


def test_tensorboard_is_written_unless_refused(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    for report_to, expected in (({}, 1), ({"report_to": "none"}, 0)):
        settings = {k: v for k, v in tiny.QUIET.items() if k != "report_to"} | report_to
        out = tmp_path / f"run{expected}"
        model, _ = tiny.tuned()
        args = fw.PrefixTrainingArguments(output_dir=str(out), max_steps=2, **settings)
        fw.PrefixTrainer(model, args, train_dataset=tiny.rows(), data_collator=Collator(0)).train()
        assert len(list(out.rglob("events.out.tfevents.*"))) == expected


# ---------------------------------------------------------------- what it saves


def test_a_checkpoint_holds_the_prefix_only(tmp_path):
    model, tuning = tiny.tuned()
    before = tiny.base_weights(model)
    tiny.trainer(model, tmp_path).train()
    folder = tmp_path / "checkpoint-6"
    ours = {"prefix.safetensors", "foreword.json", "README.md", STATE, WATCH, "training_args.json"}
    theirs = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert {p.name for p in folder.iterdir()} == ours | theirs
    base = sum(p.numel() for p in before.values())
    assert tuning.num_parameters == 2 * 4 * 2 * 16 and base > 40 * tuning.num_parameters
    assert (folder / "optimizer.pt").stat().st_size < 2 * 4 * tuning.num_parameters + 8192
    assert sum(p.stat().st_size for p in folder.iterdir()) < 50_000 < 4 * base
    assert fw.Prefix.load(folder) == tuning.bake()
    assert json.loads((folder / "training_args.json").read_text())["learning_rate"] == 2e-2
    tiny.assert_base_unchanged(model, before)


# ---------------------------------------------------------------- resuming

CASES = {
    **WAYS,
    "freeze_first": {"freeze_first": True},
    "gate head": {"gate": "head"},
    "gate zero": {"gate": "zero"},
    "gate input": {"gate": "input"},
    "infix": {"visible": "infix:1"},
    "dropout": {"dropout": 0.2},
    "mlp freeze_first gate": {"reparam": "mlp", "hidden": 16, "freeze_first": True, "gate": "zero"},
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_resuming_gives_the_uninterrupted_losses(case, accumulate, tmp_path):
    if accumulate == 2 and case not in ("direct", "dropout"):
        pytest.skip("accumulation does not look at what is accumulated")
    arguments = {"gradient_accumulation_steps": accumulate}

    model, tuning = tiny.tuned(**CASES[case])
    whole = tiny.trainer(model, tmp_path / "whole", **arguments)
    whole.train()

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # between two checkpoints: step 3 is done again
                control.should_training_stop = True

    out = tmp_path / "cut"
    model, _ = tiny.tuned(**CASES[case])
    tiny.trainer(model, out, callbacks=[Stop()], **arguments).train()
    for folder in out.glob("checkpoint-3"):  # Trainer saves when it stops; go back to the one before
        (folder / "trainer_state.json").unlink()
    assert last_checkpoint(out) == out / "checkpoint-2"
    torch.manual_seed(99)  # what happens in between is of no matter
    model, again = tiny.tuned(**CASES[case])
    resumed = tiny.trainer(model, out, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.losses(resumed) == tiny.losses(whole) and len(tiny.losses(whole)) == tiny.STEPS
    assert again.bake() == tuning.bake()
    for a, b in zip(resumed.tuning.parameters(), whole.tuning.parameters(), strict=True):
        assert torch.equal(a, b)


TOGETHER = {
    "prefix and memory": [fw.PrefixConfig(length=3, init="random"), fw.MemoryConfig(rank=2)],
    "prefix and lora": [fw.PrefixConfig(length=3, init="random"), fw.LoRAConfig(rank=2)],
    "prompt": [fw.PromptConfig(length=3, init="random", learning_rate=0.1)],
    "prompt before t5": [fw.PromptConfig(length=3, init="random")],
    "adapter and bitfit": [fw.AdapterConfig(width=4), fw.BitFitConfig(missing="add")],
    "full": [fw.FullConfig(parameters=r".*layers\.1\..*")],
}


@pytest.mark.parametrize("case", TOGETHER)
def test_methods_resume_together_each_at_its_rate(case, tmp_path):
    found = []
    for part in ("whole", "cut", "resumed"):
        model = zoo.build("t5" if case.endswith("t5") else "llama")
        tuning = fw.attach(model, TOGETHER[case])
        made = tiny.trainer(model, tmp_path / ("whole" if part == "whole" else "cut"),
                            **({"num_train_epochs": 1} if part != "cut" else {}))  # fmt: skip
        if part == "cut":
            made.add_callback(type("Stop", (transformers.TrainerCallback,), {"on_step_end": _stop_at_four})())
        made.train(resume_from_checkpoint=part == "resumed" or None)
        assert made.state.global_step == (4 if part == "cut" else tiny.STEPS)
        rates = [g["initial_lr"] for g in made.optimizer.param_groups]
        assert rates == [g["lr"] for g in tuning.parameter_groups(made.args.learning_rate)]
        assert len(rates) == len(TOGETHER[case])
        found.append((tiny.losses(made), tuning.bake()))
        tuning.detach()
    assert found[0][0] == found[2][0] and found[0][1] == found[2][1]


def _stop_at_four(self, args, state, control, **kwargs):
    control.should_training_stop = state.global_step == 4


def cut_short(folder, how):
    state = folder / "trainer_state.json"
    if how == "half trainer_state":
        state.write_text(state.read_text()[: state.stat().st_size // 2])
    else:
        what, name = how.split()
        (path,) = folder.glob(f"{name}.*")
        if what == "no":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# A kill leaves the first two; the others are lost or cut short later (a full disk, a copy that was broken off).
CUTS = ["half trainer_state", "no trainer_state", "no training_state", "half training_state", "no optimizer",
        "half optimizer", "no scheduler", "half scheduler", "no rng_state", "half rng_state", "half watch"]  # fmt: skip


@pytest.mark.parametrize("how", CUTS)
def test_a_checkpoint_that_was_cut_short_is_passed_over(how, tmp_path):
    model, tuning = tiny.tuned()
    whole = tiny.trainer(model, tmp_path)
    whole.train()
    assert last_checkpoint(tmp_path) == newest(tmp_path) == tmp_path / "checkpoint-6"
    cut_short(tmp_path / "checkpoint-6", how)
    with pytest.raises(fw.PrefixFileError, match=r"can't go on .*checkpoint-6 .*; go on from .*checkpoint-4"):
        whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    model, again = tiny.tuned()
    resumed = tiny.trainer(model, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.losses(resumed) == tiny.losses(whole)
    assert again.bake() == tuning.bake() and last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_checkpoints_that_all_lack_something_are_not_begun_over(tmp_path):
    model, _ = tiny.tuned()
    tiny.trainer(model, tmp_path, max_steps=2, save_only_model=True).train()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(fw.PrefixFileError, match=r"it has no optimizer.pt; train its prefix further in a new run"):
        tiny.trainer(model, tmp_path).train(resume_from_checkpoint=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()  # broken off in its first save: nothing was done yet
    made = tiny.trainer(model, tmp_path, max_steps=1)
    made.train(resume_from_checkpoint=True)
    assert list(tiny.losses(made)) == [1]


def test_resuming_with_nothing_to_resume_starts_anew(tmp_path):
    model, _ = tiny.tuned()
    made = tiny.trainer(model, tmp_path / "new", max_steps=1)
    made.train(resume_from_checkpoint=True)
    assert list(tiny.losses(made)) == [1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"length": 5}, r"encoder\.\w+\.\d is \(2, 4, 8\) there and \(2, 5, 8\) here"),
        ({"reparam": "low-rank"}, r"encoder\.\S+ is (\(.*\) there and absent here|absent there and \(.*\) here)"),
        ({"gate": "head"}, r"bias\.\d is absent there and \(4,\) here"),
        ({"sites": r".*layers\.0\..*"}, r"encoder\.\w+\.1 is \(2, 4, 8\) there and absent here"),
    ],
)
def test_another_configuration_is_refused_by_name(change, named, tmp_path):
    model, _ = tiny.tuned()
    tiny.trainer(model, tmp_path, max_steps=2).train()
    model, _ = tiny.tuned(**change)
    with pytest.raises(fw.PrefixFileError, match=f"another configuration: {named}"):
        tiny.trainer(model, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", ["absent", "half", "not finite"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(damage, tmp_path):
    model, tuning = tiny.tuned()
    tiny.trainer(model, tmp_path, max_steps=2).train()
    path = tmp_path / "checkpoint-2" / STATE
    if damage == "absent":
        path.unlink()
    elif damage == "half":
        path.write_bytes(path.read_bytes()[:500])
    else:
        from safetensors.torch import load_file, save_file

        state = load_file(path)
        state["encoder.keys.0"][0, 0, 0] = float("nan")
        save_file(state, path)
    before = [p.clone() for p in tuning.parameters()]
    with pytest.raises(fw.PrefixFileError, match=STATE):
        tiny.trainer(model, tmp_path).train(resume_from_checkpoint=str(path.parent))
    assert all(torch.equal(a, b) for a, b in zip(before, tuning.parameters(), strict=True))


def test_a_saved_prefix_is_trained_on_from_its_loss(tmp_path):
    model, tuning = tiny.tuned(gate="head")
    made = tiny.trainer(model, tmp_path / "a", valid=tiny.rows(seed=1), save_strategy="no")
    made.train()
    want = made.evaluate()["eval_loss"]
    tuning.bake().save(tmp_path / "prefix")
    model = zoo.build("llama")
    again = fw.attach(model, fw.Prefix.load(tmp_path / "prefix"), trainable=True)
    made = tiny.trainer(model, tmp_path / "b", valid=tiny.rows(seed=1), save_strategy="no")
    assert made.evaluate()["eval_loss"] == pytest.approx(want, abs=1e-6)
    start = again.bake()
    made.train()
    assert again.bake() != start and not torch.equal(again.holder.bias["0"], start.bias[again.sites[0].name])


# ---------------------------------------------------------------- evaluating


def test_the_best_prefix_is_loaded_at_the_end(tmp_path):
    model, tuning = tiny.tuned()
    keep = {}

    class Spoil(transformers.TrainerCallback):
        """After step 4 the prefix is made worse by hand: step 4's checkpoint is then the best."""

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                keep["best"] = tuning.bake()

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    for parameter in tuning.parameters():
                        parameter.normal_(0, 30)

    made = tiny.trainer(
        model, tmp_path, valid=tiny.rows(4), callbacks=[Spoil()], eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=1e-3,
    )  # fmt: skip
    made.train()
    evaluated = {e["step"]: e["eval_loss"] for e in made.state.log_history if "eval_loss" in e}
    best = min(evaluated, key=evaluated.get)
    assert best <= 4 and evaluated[6] > evaluated[best] + 0.1
    assert made.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    now = tuning.bake()
    saved = fw.Prefix.load(tmp_path / f"checkpoint-{best}")
    assert all(torch.equal(now.keys[s], saved.keys[s]) and torch.equal(now.values[s], saved.values[s])
               for s in saved.keys)  # fmt: skip
    assert made.evaluate()["eval_loss"] == pytest.approx(evaluated[best], abs=1e-6)


# ---------------------------------------------------------------- Trainer's own ways


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_plain_trainer_trains_a_prefix(name, tmp_path):
    model, _ = tiny.tuned(name)
    before = tiny.base_weights(model)
    args = plain_arguments(tmp_path, learning_rate=0.1, max_steps=25)
    data = tiny.rows(4)
    made = transformers.Trainer(model, args, train_dataset=data, data_collator=Collator(0, seq2seq=name == "t5"),
                                eval_dataset=data)  # fmt: skip
    before_loss = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < before_loss - 0.1
    tiny.assert_base_unchanged(model, before)


@pytest.mark.parametrize("reparam", WAYS)
def test_gradient_checkpointing_gives_the_same_losses(reparam, tmp_path):
    found = []
    for checkpointing in (False, True):
        model, tuning = tiny.tuned(**WAYS[reparam])
        made = tiny.trainer(model, tmp_path, gradient_checkpointing=checkpointing, save_strategy="no")
        before = tiny.base_weights(model)
        made.train()
        assert model.is_activation_checkpointing == checkpointing
        tiny.assert_base_unchanged(model, before)
        found.append((tiny.losses(made), tuning.bake()))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "t5", "gemma2"])
def test_base_parameters_never_get_a_gradient(name, tmp_path):
    model, tuning = tiny.tuned(name)
    seen = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            own = {id(p) for p in tuning.parameters()}
            seen.append({n for n, p in model.named_parameters() if p.grad is not None and id(p) not in own})
            assert all(p.grad.abs().max() > 0 for p in tuning.parameters())

    made = tiny.trainer(model, tmp_path, callbacks=[Look()], max_steps=2, save_strategy="no")
    made.data_collator = Collator(0, seq2seq=name == "t5")
    made.train()
    assert seen == [set(), set()]
    optimised = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in tuning.parameters()}
