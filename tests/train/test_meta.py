"""meta_train: what it leaves, that it helps on a family of tasks, that it resumes exactly, and what it refuses."""

from __future__ import annotations

import io

import pytest
import tiny
import torch
from families import dataset, family
from rich.console import Console

import foreword as fw
import zoo
from foreword.data import Collator
from foreword.train._meta_state import STATE
from foreword.train.run import train_prefix

CONFIG = fw.PrefixConfig(length=4, init="random")
PLAN = {"meta_steps": 4, "inner_steps": 2, "tasks_per_step": 2, "batch_size": 3, "save_every": 2}
METHODS = {
    "mlp": fw.PrefixConfig(length=3, init="random", reparam="mlp", hidden=8, dropout=0.1),
    "mlp from text": fw.PrefixConfig(length=3, init=zoo.SENTENCES[0], reparam="mlp", hidden=8),
    "low-rank": fw.PrefixConfig(length=3, init=zoo.SENTENCES[0], reparam="low-rank", rank=2),
    "gates": fw.PrefixConfig(length=3, init="random", gate="head", freeze_first=True),
    "memory": fw.MemoryConfig(rank=2),
    "prompt": fw.PromptConfig(length=3, init=zoo.SENTENCES[0]),
    "lora": fw.LoRAConfig(rank=2),
    "adapter": fw.AdapterConfig(width=4),
    "bitfit": fw.BitFitConfig(missing="add"),
    "full": fw.FullConfig(learning_rate=1e-2),
    "prefix and memory": [CONFIG, fw.MemoryConfig(rank=2)],
}


def run(out, what=CONFIG, tasks=None, model=None, console=None, *, resume=False, on_step=None, **plan):
    return fw.meta_train(
        model if model is not None else zoo.build("llama"), zoo.tokenizer(), what,
        tasks if tasks is not None else family(), out, fw.MetaConfig(**{**PLAN, **plan}), resume=resume,
        on_step=on_step, console=console or Console(file=io.StringIO()),
    )  # fmt: skip


def test_a_run_leaves_an_ordinary_prefix_and_an_untouched_model(tmp_path):
    model, out = zoo.build("llama"), tmp_path / "deep" / "out"
    before, logits = tiny.base_weights(model), zoo.logits(model, input_ids=zoo.ids())
    seen = []
    result = run(out, model=model, on_step=lambda *told: seen.append(told))
    assert fw.tuning.tuning_of(model) is None and not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    tiny.assert_base_unchanged(model, before)
    assert torch.equal(zoo.logits(model, input_ids=zoo.ids()), logits)
    assert fw.Prefix.load(out) == result.prefix and result.prefix.longest == 4 and result.parameters == 4 * 2 * 2 * 16
    assert result.steps == 4 and not result.interrupted and [e["step"] for e in result.history] == [1, 2, 3, 4]
    assert seen == [(e["step"], {k: e[k] for k in ("before", "after")}) for e in result.history]
    assert {p.name for p in out.iterdir()} == {"prefix.safetensors", "foreword.json", "README.md", "curve.png", STATE}
    told = fw.Prefix.load(out).metadata
    assert told["meta"]["algorithm"] == "reptile" and told["meta"]["the tasks"] == list("abcd")
    assert told["metrics"]["loss_after"] == result.history[-1]["after"]


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_reparameterisation(name, algorithm, tmp_path):
    """What is saved answers as what was trained, and goes on training."""
    model, what = zoo.build("llama"), METHODS[name]
    before = tiny.base_weights(model)
    begun = fw.attach(model, what, tokenizer=zoo.tokenizer()).bake()
    fw.tuning.tuning_of(model).detach()
    result = run(tmp_path, what, model=model, algorithm=algorithm)
    tiny.assert_base_unchanged(model, before)
    assert result.prefix != begun
    loaded = fw.Prefix.load(tmp_path)
    assert loaded == result.prefix
    tuning = fw.attach(model, loaded, trainable=True)
    trained = zoo.logits(model, input_ids=zoo.ids())
    model(input_ids=zoo.ids(), labels=zoo.ids()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuning.parameters()) and tuning.num_parameters
    tuning.detach()
    fw.attach(model, result.prefix)
    torch.testing.assert_close(zoo.logits(model, input_ids=zoo.ids()), trained, rtol=0, atol=1e-5)


def test_an_encoder_decoder(tmp_path):
    model = zoo.build("t5")
    result = run(tmp_path, model=model, algorithm="fomaml")
    assert {s.kind for s in result.prefix.sites} == {"self", "cross", "encoder"} and result.steps == 4


def test_a_prefix_made_of_a_condition(tmp_path):
    """Each example brings its vector; what is learned is still made of one."""
    vectors = torch.randn(12, 3).tolist()
    tasks = {name: data.with_column("condition", vectors) for name, data in family().items()}
    what = fw.PrefixConfig(length=3, init="random", reparam="mlp", hidden=8, condition=3)
    prefix = run(tmp_path, what, tasks).prefix
    assert prefix.given(vectors[0]) != prefix.given(vectors[1])
    named = {name: data.with_column("task", [name] * 12) for name, data in family().items()}
    assert run(tmp_path / "named", tasks=named).steps == 4  # a column that says what the mapping says


def adapted(model, what, data, valid, steps, rate=2e-2):
    """The loss on unseen examples of a task after some plain Adam steps."""
    tuning = fw.attach(model, what, tokenizer=zoo.tokenizer(), trainable=True)
    optimizer, collate = torch.optim.Adam(tuning.parameters(), lr=rate), Collator(0)
    for step in range(steps):
        optimizer.zero_grad()
        model(**collate([data[(4 * step + i) % len(data)] for i in range(4)])).loss.backward()
        optimizer.step()
    with torch.no_grad():
        loss = float(model(**collate([valid[i] for i in range(len(valid))])).loss)
    tuning.detach()
    return loss


@pytest.mark.parametrize("algorithm", ["reptile", "fomaml"])
def test_unseen_tasks_are_learned_from_it_in_fewer_steps(algorithm, tmp_path):
    model, tasks = zoo.build("llama"), family(12, seed=3)
    unseen = {name: tasks.pop(name) for name in "abc"}
    plan = {"meta_steps": 40, "inner_steps": 3, "inner_learning_rate": 5e-2}
    plan |= {"meta_learning_rate": 0.1} if algorithm == "fomaml" else {}
    start = run(tmp_path, tasks=tasks, model=model, algorithm=algorithm, **plan).prefix
    for data in unseen.values():
        rows = [data[i]["input_ids"] for i in range(len(data))]
        train, valid = dataset(rows[:8]), dataset(rows[8:])
        from_start = [adapted(model, start, train, valid, steps, 5e-2) for steps in (0, 3)]
        from_random = [adapted(model, CONFIG, train, valid, steps, 5e-2) for steps in (0, 3)]
        assert from_start[1] < from_start[0] < from_random[0] - 0.3
        assert from_start[1] < from_random[1] - 0.3


def test_training_goes_on_from_it(tmp_path):
    """`train_prefix` (`foreword train --start`) begins at what was learned, and saves where that came from."""
    model = zoo.build("llama")
    start = run(tmp_path / "start", METHODS["mlp"], model=model).prefix
    settings = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-3, "use_cpu": True, "report_to": "none"}
    console = Console(file=io.StringIO())
    result = train_prefix(
        model, zoo.tokenizer(), fw.Prefix.load(tmp_path / "start"), family()["a"], tmp_path / "out", settings,
        console=console,
    )  # fmt: skip
    site = start.sites[0].name
    moved = (result.prefix.keys[site] - start.keys[site]).abs()
    assert 0 < float(moved.max()) <= 1.001e-3  # one step of Adam: the numbers themselves are trained, no MLP
    assert result.parameters == 3 * 2 * 2 * 16 and result.prefix.metadata["meta"]["algorithm"] == "reptile"


def test_the_seed_decides(tmp_path):
    tasks, told = family(), METHODS["mlp"]
    found = [run(tmp_path / str(i), told, tasks, seed=seed).prefix for i, seed in enumerate((3, 3, 4))]
    assert found[0] == found[1] and found[0] != found[2]


class Killed(Exception):
    pass


@pytest.mark.parametrize(("algorithm", "what"), [("reptile", METHODS["mlp"]), ("fomaml", METHODS["prefix and memory"])])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_run_that_is_broken_off_goes_on_to_the_bit(algorithm, what, at, tmp_path):
    def breaks(step, losses):
        if step == at:
            raise Killed

    plan = {"algorithm": algorithm, "meta_steps": 5}
    whole = run(tmp_path / "whole", what, **plan)
    with pytest.raises(Killed):
        run(tmp_path / "killed", what, on_step=breaks, **plan)
    assert not (tmp_path / "killed" / "foreword.json").exists()
    resumed = run(tmp_path / "killed", what, resume=True, **{**plan, "save_every": 1})  # how often may differ
    assert resumed.prefix == whole.prefix and resumed.history == whole.history
    assert (tmp_path / "killed" / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()


def test_a_finished_run_resumes_to_itself(tmp_path):
    first = run(tmp_path)
    for name in ("foreword.json", "README.md"):  # killed while the prefix was being saved
        (tmp_path / name).unlink()
    again = run(tmp_path, resume=True)
    assert again.prefix == first.prefix == fw.Prefix.load(tmp_path) and again.history == first.history


def test_what_is_resumed_has_to_be_the_same_run(tmp_path):
    tasks = family()
    run(tmp_path, tasks=tasks)
    other = {**tasks, "d": family(seed=9)["d"]}
    for changed, said in (
        ({"inner_steps": 3}, "inner_steps was 2 there and is 3 here"),
        ({"inner_learning_rate": 1e-3}, "inner_learning_rate was null there and is 0.001 here"),
        ({"tasks": other}, "the data was"),
        ({"tasks": dict(reversed(tasks.items()))}, "the tasks was"),
        ({"model": zoo.build("llama", seed=1)}, "the model was"),
        ({"what": fw.PrefixConfig(length=5, init="random")}, "what is trained was"),
        ({"what": fw.LoRAConfig()}, "what is trained was"),
    ):
        with pytest.raises(fw.ConfigError, match=f"holds another meta-training: {said}"):
            run(tmp_path, resume=True, **{"tasks": tasks, **changed})
    assert run(tmp_path, tasks=tasks, resume=True).steps == 4


def test_a_damaged_state_is_refused(tmp_path):
    run(tmp_path)
    whole = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(fw.PrefixFileError, match="can't be read as safetensors"):
        run(tmp_path, resume=True)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / STATE)
    with pytest.raises(fw.PrefixFileError, match="doesn't say where its run stands"):
        run(tmp_path, resume=True)


def test_the_out_folder_is_never_overwritten_by_chance(tmp_path):
    with pytest.raises(fw.ConfigError, match="holds no meta-training; leave --resume out"):
        run(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    run(tmp_path / "out")
    with pytest.raises(fw.ConfigError, match="holds a meta-training already; go on with it"):
        run(tmp_path / "out")
    (tmp_path / "other").mkdir()
    for name in ("README.md", "foreword.json", "checkpoint-3"):
        path = tmp_path / "other" / name
        path.touch()
        with pytest.raises(fw.ConfigError, match=f"holds {name}, which is not of a meta-training"):
            run(tmp_path / "other")
        path.unlink()
    (tmp_path / "file").touch()
    with pytest.raises(fw.ConfigError, match="is a file"):
        run(tmp_path / "file")


@pytest.mark.parametrize("bad", [
    {"algorithm": "maml"}, {"inner_optimizer": "adamw"}, {"meta_optimizer": "lion"}, {"meta_steps": 0},
    {"tasks_per_step": 0}, {"inner_steps": 0}, {"inner_steps": 1.5}, {"batch_size": True}, {"save_every": -1},
    {"algorithm": "fomaml", "query_size": 0}, {"query_size": 4}, {"inner_learning_rate": 0}, {"clip": -1.0},
    {"inner_learning_rate": float("nan")}, {"meta_learning_rate": -1e-3}, {"meta_learning_rate": float("inf")},
    {"inner_optimizer": "sgd"}, {"algorithm": "fomaml", "meta_optimizer": "sgd"}, {"clip": float("nan")},
])  # fmt: skip
def test_settings_that_make_no_sense(bad):
    with pytest.raises(fw.ConfigError, match=rf"{next(k for k in reversed(bad))}"):
        fw.MetaConfig(**bad)


def test_tasks_that_can_not_be_learned_from(tmp_path):
    tasks = family(3)
    for few in ({}, {"a": tasks["a"]}):
        with pytest.raises(fw.ConfigError, match="give two or more"):
            run(tmp_path / "out", tasks=few)
    with pytest.raises(fw.DataError, match="the task 'empty' has 0 examples, and a step takes 3; give it 3 or more"):
        run(tmp_path / "out", tasks={**tasks, "empty": dataset([])})
    five = {**tasks, "five": dataset([[5, 6, 7]] * 5)}
    with pytest.raises(fw.DataError, match="'five' has 5 examples, and a step takes 3 and 3 others for its query"):
        run(tmp_path / "out", tasks=five, algorithm="fomaml")
    with pytest.raises(fw.ConfigError, match="one start for all tasks"):
        run(tmp_path / "out", fw.PrefixConfig(length=2, init="random", tasks=("a", "b")))
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", tasks=five, algorithm="fomaml", query_size=2).steps == 4


@pytest.mark.parametrize("kind", ["inner", "query", "meta"])
def test_divergence_keeps_the_last_good_start(kind, tmp_path):
    """What is saved is the start before the step that failed."""
    model = zoo.build("llama")
    before = tiny.base_weights(model)
    largest = 3.4e38  # of float32; twice of it is infinite
    plan, said = {
        "inner": ({"inner_learning_rate": largest}, "the loss is nan at inner step 2 on the task '[abcd]'"),
        "query": ({"inner_learning_rate": largest, "inner_steps": 1, "algorithm": "fomaml"}, "nan at the query batch"),
        "meta": ({"meta_learning_rate": largest, "inner_learning_rate": 10.0}, "not finite after the meta-step"),
    }[kind]
    with pytest.raises(fw.DivergedError, match=rf"diverged at step 1: .*{said}.*The start before it is in .*last-good"):
        run(tmp_path, model=model, **plan)
    tiny.assert_base_unchanged(model, before)
    assert fw.tuning.tuning_of(model) is None and not model.training and not (tmp_path / "foreword.json").exists()
    assert fw.Prefix.load(tmp_path / "last-good") == fw.attach(model, CONFIG).bake()
    model.foreword.tuning.detach()
    # The state is that of the step before, too: it can be looked at, and an end at the same step is no surprise.
    with pytest.raises(fw.DivergedError, match="diverged at step 1"):
        run(tmp_path, model=model, resume=True, **plan)


def test_divergence_later_on(tmp_path):
    """The start of the last step that was well, although no state was saved of it."""
    whole = run(tmp_path / "whole", meta_steps=2, anneal=False)
    model = zoo.build("llama")

    def note(step, losses):
        if step == 2:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")

    plan = {"meta_steps": 4, "anneal": False, "save_every": 100}
    with pytest.raises(fw.DivergedError, match="diverged at step 3: the loss is nan at inner step 1"):
        run(tmp_path / "out", model=model, on_step=note, **plan)
    assert fw.Prefix.load(tmp_path / "out" / "last-good") == whole.prefix


def test_the_bar_shows_both_losses(tmp_path):
    told = io.StringIO()
    result = run(tmp_path / "tasks", console=Console(file=told, force_terminal=True, width=120))
    last = result.history[-1]
    assert f"{last['before']:.3f} → {last['after']:.3f}" in told.getvalue() and "4/4" in told.getvalue()
