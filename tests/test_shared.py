"""Several tasks in one run, and what encoders share: layers, tasks, keys."""

from __future__ import annotations

import pytest
import torch

import foreword as fw
import zoo
from test_conditional import alone, stirred

TASKS = ("film", "food", "news")
SMALL = {"length": 3, "init": "random", "tasks": TASKS, "hidden": 8, "rank": 2}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("options", [
    {}, {"reparam": "mlp"}, {"reparam": "low-rank"}, {"share": "keys"}, {"share": "keys", "freeze_first": True},
    {"reparam": "mlp", "share": "layers", "freeze_first": True}, {"gate": "input"}, {"gate": "zero"},
])  # fmt: skip
def test_each_row_reads_its_own_task(name, options):
    model, arguments = zoo.build(name), zoo.inputs(name, batch=4)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**SMALL, **options)))
    rows = ["news", "film", "news", "film"]
    together = zoo.logits(model, **arguments, task=rows)
    assert torch.equal(zoo.logits(model, **arguments, task=torch.tensor([2, 0, 2, 0])), together)
    baked = {task: tuning.bake(task=task) for task in TASKS}
    tuning.detach()
    for row, task in enumerate(rows):
        own = alone(model, baked[task], arguments)[row]
        torch.testing.assert_close(together[row], own, atol=2e-5, rtol=1e-4)
    assert baked["film"] != baked["food"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_tasks_of_a_batch_learn(checkpointing):
    model, ids = zoo.build("llama").train(), zoo.ids(3)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**SMALL)))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=ids, labels=ids, task=["food", "film", "food"]).loss.backward()
    for parameter in tuning.encoder.parameters():
        film, food, news = parameter.grad.flatten(1).norm(dim=1)
        assert film > 0 and food > 0 and news == 0


@pytest.mark.parametrize("beams", [1, 2])
def test_tasks_generate_in_one_batch(beams):
    model, ids = zoo.build("llama"), zoo.ids(3, 5)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**SMALL, reparam="mlp")))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    with tuning.given(task=["food", "film", "food"]):
        mixed = model.generate(ids, **options)
    for row, task in enumerate(("food", "film", "food")):
        with tuning.given(task=task):
            assert torch.equal(model.generate(ids[row : row + 1], **options), mixed[row : row + 1])


def test_beside_a_memory_and_seen_by_some():
    """A memory is one for all tasks; visibility is one rule for all tasks."""
    model, ids = zoo.build("llama"), zoo.ids(2)
    both = [fw.PrefixConfig(**SMALL, visible="first:3"), fw.MemoryConfig(rank=2)]
    tuning = stirred(fw.attach(model, both))
    together = zoo.logits(model, input_ids=ids, task=["film", "news"])
    baked = [tuning.bake(task="film"), tuning.bake(task="news")]
    tuning.detach()
    for row, prefix in enumerate(baked):
        torch.testing.assert_close(together[row], alone(model, prefix, {"input_ids": ids})[row], atol=2e-5, rtol=1e-4)


def test_shared_keys_are_the_same_numbers():
    model = zoo.build("llama")
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**SMALL, share="keys")))
    film, food = tuning.bake(task="film"), tuning.bake(task="food")
    for name in film.keys:
        assert torch.equal(film.keys[name], food.keys[name])
        assert not torch.equal(film.values[name], food.values[name])
    keys, values = (sum(t.numel() for t in group.values()) for group in (film.keys, film.values))
    assert tuning.num_parameters == keys + len(TASKS) * values


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_one_mlp_for_all_layers(name):
    """``P[l, i] = MLP(P'[i] + L[l])``, by hand."""
    model = zoo.build(name)
    config = fw.PrefixConfig(length=3, init="random", reparam="mlp", hidden=8, share="layers")
    tuning = stirred(fw.attach(model, config))
    encoder, prefix = tuning.encoder, tuning.bake()
    site, layers = tuning.sites[0], len(tuning.sites)
    width = site.kv_heads * (site.key_dim + site.value_dim)
    assert tuning.num_parameters == 3 * 8 + layers * 8 + (8 * 8 + 8) + (8 * width + width)
    for layer, own in enumerate(tuning.sites):
        rows = encoder.nets[0](encoder.embeddings[0] + encoder.layers[0][layer])
        keys, values = rows.split([site.kv_heads * site.key_dim, site.kv_heads * site.value_dim], 1)
        for made, kept, dim in ((keys, prefix.keys, site.key_dim), (values, prefix.values, site.value_dim)):
            by_hand = made.view(3, site.kv_heads, dim).transpose(0, 1)
            torch.testing.assert_close(kept[own.name], by_hand, atol=1e-6, rtol=1e-5)


def test_sites_that_differ_cannot_share_an_mlp():
    model, arguments = zoo.build("llava"), zoo.inputs("llava")
    config = fw.PrefixConfig(length=2, init="random", reparam="mlp", share="layers", sites=".*")
    with pytest.raises(fw.ConfigError, match="differs in heads or dimensions"):
        fw.attach(model, config, example_inputs=arguments)
    assert zoo.logits(model, **arguments).isfinite().all()


def test_each_task_starts_at_its_own_text(tokenizer):
    model, ids = zoo.build("llama"), zoo.ids()
    texts = dict(zip(TASKS, zoo.SENTENCES, strict=True))
    config = fw.PrefixConfig(length=5, init=texts, tasks=TASKS, reparam="mlp", hidden=8)
    tuning = fw.attach(model, config, tokenizer=tokenizer)
    got = {task: zoo.logits(model, input_ids=ids, task=task) for task in TASKS}
    tuning.detach()
    for task, text in texts.items():
        want = alone(model, fw.Prefix.from_text(model, tokenizer, text, length=5), {"input_ids": ids})
        torch.testing.assert_close(got[task], want, atol=1e-5, rtol=1e-4)
    with pytest.raises(fw.ConfigError, match=r"different lengths .* length="):
        fw.attach(model, fw.PrefixConfig(length=None, init=texts, tasks=TASKS), tokenizer=tokenizer)


def test_saved_one_folder_a_task(tmp_path):
    model = zoo.build("llama")
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**SMALL)))
    assert tuning.save(tmp_path / "all") == tmp_path / "all"
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(TASKS)
    for task in TASKS:
        loaded = fw.Prefix.load(tmp_path / "all" / task)
        assert loaded == tuning.bake(task=task) and loaded.metadata["task"] == task


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("a", "a")}, "names a task twice"),
        ({"tasks": ("../a",)}, "can't name a folder"),
        ({"tasks": "film"}, "is one text; expected a list"),
        ({"tasks": ("a", "b"), "init": {"a": "A text."}}, "a start for each task"),
        ({"share": "keys"}, 'is for several tasks with reparam="direct"'),
        ({"share": "layers"}, 'use reparam="mlp"'),
        ({"share": "tasks"}, "expected one of"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(fw.ConfigError, match=message):
        fw.PrefixConfig(**options)


def test_bad_tasks():
    model, ids = zoo.build("llama"), zoo.ids(2)
    tuning = fw.attach(model, fw.PrefixConfig(**SMALL))
    for task, message in (
        ("fild", "did you mean film"),
        ([], "names no task"),
        (torch.tensor([0, 3]), "expected 0 to 2"),
    ):
        with pytest.raises(fw.ConfigError, match=message):
            model(input_ids=ids, task=task)
    with pytest.raises(fw.AttachError, match="depends on its task"):
        model(input_ids=ids)
    with pytest.raises(fw.ConfigError, match=r"bake one of them: task='film'"):
        tuning.bake()
