"""Tasks in subspaces of their own: the start by QR, and the measure of what they share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.initializers import random_states
from foreword.orthogonal import in_spaces, orthogonalised, overlap, penalty

TASKS = ("film", "food", "news")


def draw(tasks, heads, length, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, heads, length, dim, generator=generator, dtype=torch.float64)


def by_hand(states):
    """The mean squared cosine of each pair of tasks, one pair of tokens at a time."""
    tasks, heads, length, dim = states.shape
    each_head = tasks * length <= dim
    tokens = [[[states[t, h, p] for h in range(heads)] if each_head else [states[t, :, p].reshape(-1)]
               for p in range(length)] for t in range(tasks)]  # fmt: skip
    found = torch.zeros(tasks, tasks)
    for a in range(tasks):
        for b in range(tasks):
            pairs = [p for own in tokens[a] for other in tokens[b] for p in zip(own, other, strict=True)]
            cosines = [x @ y / (x.norm() * y.norm()) for x, y in pairs]
            found[a, b] = sum(c**2 for c in cosines) / len(cosines)
    return found


shapes = st.tuples(st.integers(2, 4), st.integers(1, 3), st.integers(1, 4), st.integers(3, 12))


@given(shape=shapes, seed=st.integers(0, 99))
def test_overlap_is_the_mean_squared_cosine(shape, seed):
    states = draw(*shape, seed=seed)
    found = overlap(states)
    torch.testing.assert_close(found, by_hand(states).to(found), atol=1e-5, rtol=1e-4)
    assert ((found >= 0) & (found <= 1 + 1e-6)).all()
    scales = torch.rand(*shape[:3], 1, generator=torch.Generator().manual_seed(seed)) * 9 + 0.1
    if len(in_spaces(states)) == shape[1]:  # over the heads together, a token is scaled in all of them
        torch.testing.assert_close(overlap(states * scales), found, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(overlap(states * scales[:, :1]), found, atol=1e-5, rtol=1e-4)


@given(shape=shapes, seed=st.integers(0, 99))
def test_qr_makes_tasks_orthogonal_and_keeps_lengths(shape, seed):
    tasks, heads, length, dim = shape
    states = draw(*shape, seed=seed)
    if tasks * length > heads * dim:
        return
    made = orthogonalised(states)
    rows, before = in_spaces(made), in_spaces(states)
    gram = rows @ rows.mT
    torch.testing.assert_close(gram, torch.diag_embed(before.square().sum(-1)), atol=1e-8, rtol=1e-8)
    assert (overlap(made) - torch.diag(overlap(made).diagonal())).abs().max() < 1e-9
    # The first token of each space stays as it is; the others keep a part of their own direction.
    torch.testing.assert_close(rows[:, 0], before[:, 0], atol=1e-9, rtol=1e-9)
    assert ((rows * before).sum(-1) > 0).all()


def test_gradients_are_finite_and_zero_where_tasks_are_apart():
    states = torch.zeros(2, 1, 2, 6)
    states[0, 0, 0, 0] = states[1, 0, 0, 1] = 1.0  # and two tokens of 0
    states.requires_grad_()
    shared = overlap(states)[0, 1]
    shared.backward()
    assert shared == 0 and torch.equal(states.grad, torch.zeros_like(states))
    random = draw(2, 2, 3, 8).float().requires_grad_()
    start = overlap(random)[0, 1]
    for _ in range(200):
        (gradient,) = torch.autograd.grad(overlap(random)[0, 1], random)
        random = (random - 2 * gradient).detach().requires_grad_()
    assert torch.isfinite(gradient).all() and overlap(random)[0, 1] < start / 50


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(("length", "each_head"), [(2, True), (4, False)])
def test_the_orthogonal_start(name, length, each_head):
    model = zoo.build(name)
    config = fw.PrefixConfig(length=length, init="orthogonal", tasks=TASKS)
    tuning = fw.attach(model, config)
    baked = [tuning.bake(task=task) for task in TASKS]
    sites = tuning.sites
    assert float(penalty(tuning.encoder, 3).detach()) < 1e-9
    tuning.detach()
    for kind in ("keys", "values"):
        for site in sites:
            states = torch.stack([getattr(p, kind)[site.name] for p in baked])
            assert (len(in_spaces(states)) == site.kv_heads) == each_head
            apart = overlap(states)
            assert (apart - torch.diag(apart.diagonal())).max() < 1e-9
            # As large as the random start, in the mean over many draws of it.
            drawn = [
                random_states(model, [site], {site.name: 64}, seed)[site.name][kind == "values"] for seed in range(4)
            ]
            want, got = torch.stack(drawn).square().mean(), states.square().mean()
            assert 0.5 < float(got / want) < 2, (site.name, kind)


def test_starts_differ_by_seed_and_train_as_any_other():
    model, ids = zoo.build("llama"), zoo.ids()
    tuning = fw.attach(model, fw.PrefixConfig(length=2, init="orthogonal", tasks=TASKS, reparam="mlp", hidden=8))
    first = tuning.bake(task="film")
    assert float(penalty(tuning.encoder, 3).detach()) < 1e-9  # an MLP adds to it, from zero
    model.train()(input_ids=ids, labels=ids, task="food").loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in tuning.parameters() if p.grad is not None)
    tuning.detach()
    tuning = fw.attach(model.eval(), fw.PrefixConfig(length=2, init="orthogonal", tasks=TASKS, seed=1))
    assert tuning.bake(task="film") != first


def test_what_has_no_room_is_refused_with_the_numbers():
    model = zoo.build("llama")  # 2 heads of 8
    fw.attach(model, fw.PrefixConfig(length=5, init="orthogonal", tasks=TASKS)).detach()
    said = r"3 tasks of 6 tokens of their own are 18 directions, and .*0\.self_attn has 16 \(2 heads of 8\); use 5"
    with pytest.raises(fw.ConfigError, match=said):
        fw.attach(model, fw.PrefixConfig(length=6, init="orthogonal", tasks=TASKS))
    assert fw.tuning.tuning_of(model) is None
    fw.attach(model, fw.PrefixConfig(length=6, init="orthogonal", tasks=TASKS, common=1)).detach()
    fw.attach(model, fw.PrefixConfig(length=6, init="orthogonal", tasks=TASKS, lengths={".*": 5})).detach()


@pytest.mark.parametrize(("options", "message"), [
    ({}, "keeps tasks apart, and there are 0; name two or more"),
    ({"tasks": ("a",)}, "keeps tasks apart, and there are 1"),
    ({"tasks": ("a", "b"), "init": {"a": "orthogonal", "b": "random"}}, "a start for all tasks together"),
    ({"tasks": ("a", "b"), "length": None}, "length=None takes the length of the init text"),
])  # fmt: skip
def test_bad_configurations(options, message):
    with pytest.raises(fw.ConfigError, match=message):
        fw.PrefixConfig(**{"init": "orthogonal", **options})


def test_the_penalty_is_about_trained_tokens_of_the_tasks_own():
    """The same tokens in all tasks count, where they are trained; common and frozen ones, and shared keys, don't."""
    model = zoo.build("llama")
    config = {"length": 5, "init": "random", "tasks": TASKS}

    def of(**options):
        tuning = fw.attach(model, fw.PrefixConfig(**{**config, **options}))
        baked = [tuning.bake(task=task) for task in TASKS]
        found = float(penalty(tuning.encoder, 3).detach())
        if options.get("share") != "keys":
            first = 1 if options.get("freeze_first") else options.get("common", 0)
            pairs = [(0, 1), (0, 2), (1, 2)]
            states = [torch.stack([getattr(p, kind)[s.name][:, first:] for p in baked])
                      for kind in ("keys", "values") for s in tuning.sites]  # fmt: skip
            want = sum(float(overlap(x)[pair]) for x in states for pair in pairs) / (3 * len(states))
            assert found == pytest.approx(want, rel=1e-4)
        tuning.detach()
        return found

    plain = of()
    assert of(freeze_first=True) != plain != of(common=2)
    assert of(share="keys") < 1 and of(share="keys", init={"*": "words:good film"} | dict.fromkeys(TASKS, "random")) < 1
    tuning = fw.attach(model, fw.PrefixConfig(**config))
    tuning.grow_to(2)
    assert float(penalty(tuning.encoder, 3).detach()) != pytest.approx(plain)
