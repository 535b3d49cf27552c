"""Virtual tokens that all tasks share, before those that are each task's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreword as fw
import zoo
from test_conditional import alone, stirred

TASKS = ("film", "food", "news")
SMALL = {"length": 5, "init": "random", "tasks": TASKS, "common": 2, "hidden": 8, "rank": 2}
WAYS = [
    {}, {"reparam": "mlp"}, {"reparam": "low-rank"}, {"share": "keys"}, {"freeze_first": True}, {"init": "orthogonal"},
    {"reparam": "mlp", "share": "layers", "freeze_first": True}, {"gate": "head"},
    {"lengths": {r".*\.1\..*": 3}}, {"reparam": "low-rank", "freeze_first": True, "lengths": {r".*\.1\..*": 3}},
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("options", WAYS)
def test_baked_prefixes_say_what_the_trained_ones_say(name, options):
    if name == "t5" and "lengths" in options:
        options = {**options, "lengths": {r"decoder.*SelfAttention": 3}}
    model, arguments = zoo.build(name), zoo.inputs(name, batch=4)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**{**SMALL, **options})))
    rows = ["news", "film", "news", "food"]
    together = zoo.logits(model, **arguments, task=rows)
    baked = {task: tuning.bake(task=task) for task in TASKS}
    tuning.detach()
    for site, keys in baked["film"].keys.items():
        values = {task: p.values[site] for task, p in baked.items()}
        assert torch.equal(keys[:, :2], baked["food"].keys[site][:, :2])
        assert torch.equal(values["film"][:, :2], values["news"][:, :2])
        assert not torch.isclose(values["film"][:, 2:], values["news"][:, 2:]).all(-1).any()
        assert keys.shape[1] == (3 if "lengths" in options and ".1." in site else 5) or name == "t5"
    for row, task in enumerate(rows):
        own = alone(model, baked[task], arguments)[row]
        torch.testing.assert_close(together[row], own, atol=2e-5, rtol=1e-4)


@settings(max_examples=15)
@given(
    common=st.integers(1, 3), own=st.integers(1, 3), tasks=st.integers(1, 3),
    reparam=st.sampled_from(["direct", "mlp", "low-rank"]), frozen=st.booleans(),
    rows=st.lists(st.integers(0, 2), min_size=2, max_size=4),
)  # fmt: skip
def test_the_common_part_learns_from_every_task(common, own, tasks, reparam, frozen, rows):
    """Its gradient is the sum of what it would get from each task's rows alone; each task's own part, its own's."""
    frozen = frozen and common > 1
    rows = [r % tasks for r in rows]
    config = {"length": common + own, "tasks": TASKS[:tasks], "common": common, "reparam": reparam}
    model, ids = zoo.build("llama").train(), zoo.ids(len(rows))
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**{**SMALL, **config}, freeze_first=frozen)))

    def gradients(chosen):
        for parameter in tuning.parameters():
            parameter.grad = None
        logits = model(input_ids=ids[chosen], task=[TASKS[rows[i]] for i in chosen]).logits
        (logits.square().sum() / 1e3).backward()
        return {n: p.grad.clone() for n, p in tuning.named_parameters()}

    whole = gradients(list(range(len(rows))))
    by_task = [gradients([i for i, r in enumerate(rows) if r == task]) for task in sorted(set(rows))]
    shared = [n for n in whole if "common" in n]
    assert shared and all(whole[n].abs().max() > 0 for n in shared)
    for name, got in whole.items():
        torch.testing.assert_close(got, sum(g[name] for g in by_task), atol=1e-5, rtol=1e-3)
    absent = set(range(tasks)) - set(rows)
    for name in ("encoder.keys.0", "encoder.embeddings.0", "encoder.tokens"):
        assert all(whole[name][task].abs().max() == 0 for task in absent if name in whole)


def test_how_many_numbers_are_trained():
    model = zoo.build("llama")
    counts = {}
    for common in (0, 2, 4):
        tuning = fw.attach(model, fw.PrefixConfig(**{**SMALL, "common": common}))
        counts[common] = tuning.num_parameters
        tuning.detach()
    a_token = 2 * 2 * 2 * 8  # layers, keys and values, heads, dimensions
    assert counts == {0: 15 * a_token, 2: 11 * a_token, 4: 7 * a_token}


def test_one_text_for_all_begins_with_its_own_tokens(tokenizer):
    """Common or not, an untrained text is the model prompted with it."""
    model, ids = zoo.build("llama"), zoo.ids()
    text = zoo.SENTENCES[0]
    tuning = fw.attach(model, fw.PrefixConfig(length=5, init=text, tasks=TASKS, common=2), tokenizer=tokenizer)
    got = zoo.logits(model, input_ids=ids, task="food")
    tuning.detach()
    want = alone(model, fw.Prefix.from_text(model, tokenizer, text, length=5), {"input_ids": ids})
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("offset", [0, 6])
def test_a_text_for_each_stands_behind_that_of_all_as_joined(name, offset, tokenizer):
    model, ids = zoo.build(name), zoo.ids()
    texts = {"film": zoo.SENTENCES[0], "*": zoo.SENTENCES[2], "food": zoo.SENTENCES[1]}
    config = fw.PrefixConfig(length=6, init=texts, tasks=TASKS, common=2, position_offset=offset)
    tuning = fw.attach(model, config, tokenizer=tokenizer)
    baked = {task: tuning.bake(task=task) for task in TASKS}
    got = {task: zoo.logits(model, input_ids=ids, task=task) for task in TASKS}
    tuning.detach()

    def text(words, length):
        return fw.Prefix.from_text(model, tokenizer, words, length=length, position_offset=offset)

    for task in TASKS:
        joined = text(texts["*"], 2).join(text(texts.get(task, texts["*"]), 4))
        for site in joined.keys:
            torch.testing.assert_close(baked[task].keys[site], joined.keys[site], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(baked[task].values[site], joined.values[site], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got[task], alone(model, joined, {"input_ids": ids}), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("options", "message"), [
    ({"common": -1}, "common=-1; expected 0 or more"),
    ({"common": 2}, "common=2 is shared by tasks; name them"),
    ({"common": 20, "tasks": TASKS}, "common=20 of 20 virtual tokens leaves the tasks none of their own"),
    ({"common": 2, "tasks": TASKS, "lengths": {"a": 2}}, "common=2 of 2 virtual tokens"),
    ({"common": 1, "tasks": TASKS, "freeze_first": True}, "leaves nothing common to train"),
    ({"tasks": TASKS, "init": {"film": "a"}}, r"names \['film'\] and tasks"),
    ({"tasks": TASKS, "init": {"*": "a", "flim": "b"}}, "expected a start for each task"),
    ({"init": {"*": "a"}}, "expected a start for each task"),
])  # fmt: skip
def test_bad_configurations(options, message):
    with pytest.raises(fw.ConfigError, match=message):
        fw.PrefixConfig(**options)


def test_a_text_that_the_common_tokens_use_up_is_refused(tokenizer):
    config = fw.PrefixConfig(length=None, init="good", tasks=TASKS, common=9)
    model = zoo.build("llama")
    with pytest.raises(fw.ConfigError, match=r"common=9 with a site of \d tokens"):
        fw.attach(model, config, tokenizer=tokenizer)
    assert fw.tuning.tuning_of(model) is None
