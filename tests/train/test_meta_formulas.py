"""The updates of Reptile and first-order MAML against the papers' formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from families import family
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

import foreword as fw
import zoo
from foreword.data import Collator
from foreword.train._meta_step import MetaStep
from foreword.train.meta_config import draw

CONFIG = fw.PrefixConfig(length=3, init="random")
COLLATE = Collator(0)


def precise(what=CONFIG, seed=0):
    """A tiny model in float64 with something trainable on it."""
    model = zoo.build("llama", seed=seed)
    tuning = fw.attach(model, what, tokenizer=zoo.tokenizer(), trainable=True)
    model.double().eval()
    return model, tuning


def batch(tasks, task, rows):
    return COLLATE([tasks[task][i] for i in rows])


class Explicit:
    """Losses and gradients as functions of parameters that are passed: nothing is changed in place."""

    def __init__(self, tasks, what=CONFIG):
        self.model, self.tuning = precise(what)
        self.tasks = list(tasks.values())
        self.names = [f"foreword.{n}" for n, _ in self.tuning.named_parameters()]
        self.start = [p.detach().clone() for p in self.tuning.parameters()]

    def gradient(self, numbers, task, rows):
        numbers = [n.detach().requires_grad_() for n in numbers]
        parameters = dict(zip(self.names, numbers, strict=True))
        loss = functional_call(self.model, parameters, (), batch(self.tasks, task, rows)).loss
        return torch.autograd.grad(loss, numbers)

    def adapted(self, numbers, episode, rate):
        """U(φ) for plain steps."""
        for rows in episode.support:
            numbers = [n - rate * g for n, g in zip(numbers, self.gradient(numbers, episode.task, rows), strict=True)]
        return numbers


def meta_step(tasks, plan, steps, what=CONFIG):
    """The parameters after some meta-steps of ours."""
    _, tuning = precise(what)
    step = MetaStep(tuning, plan, list(tasks.items()), COLLATE)
    losses = [step(number) for number in range(steps)]
    return [p.detach().clone() for p in tuning.parameters()], losses


def mean(lists):
    return [torch.stack(same).mean(0) for same in zip(*lists, strict=True)]


def assert_close(found, expected, least_moved_from=None, tolerance=1e-12):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    if least_moved_from is not None:
        assert max(float((a - s).abs().max()) for a, s in zip(found, least_moved_from, strict=True)) > 1e-5


PLAIN = {"inner_optimizer": "sgd", "inner_learning_rate": 0.3, "clip": 0.0, "batch_size": 3, "seed": 4}


def test_reptile_with_one_plain_step_is_joint_sgd_on_the_mixture():
    tasks = family(4, examples=9)
    plan = fw.MetaConfig(**PLAIN, inner_steps=1, tasks_per_step=4, meta_learning_rate=0.5, anneal=False)
    found, _ = meta_step(tasks, plan, 5)

    model, tuning = precise()  # texts of one length: the mean of the tasks' losses is that of one mixed batch
    start = [p.detach().clone() for p in tuning.parameters()]
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5 * 0.3)
    for number in range(5):
        episodes = draw(plan, [9] * 4, number)
        assert sorted(e.task for e in episodes) == [0, 1, 2, 3]
        rows = [list(tasks.values())[e.task][i] for e in episodes for i in e.support[0]]
        optimizer.zero_grad()
        model(**COLLATE(rows)).loss.backward()
        optimizer.step()
    assert_close(found, [p.detach() for p in tuning.parameters()], start, tolerance=1e-9)


@pytest.mark.parametrize("anneal", [False, True])
def test_reptile_moves_to_the_mean_of_what_tasks_were_adapted_to(anneal):
    tasks = family(5)
    plan = fw.MetaConfig(**PLAIN, meta_steps=4, inner_steps=3, tasks_per_step=2, meta_learning_rate=0.7, anneal=anneal)
    found, _ = meta_step(tasks, plan, 3)
    explicit = Explicit(tasks)
    numbers = explicit.start
    for number in range(3):
        share = 0.7 * (1 - number / 4 if anneal else 1)
        episodes = draw(plan, [12] * 5, number)
        assert len(episodes) == 2
        ends = mean([explicit.adapted(numbers, e, 0.3) for e in episodes])
        numbers = [n + share * (end - n) for n, end in zip(numbers, ends, strict=True)]
    assert_close(found, numbers, explicit.start)


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_fomaml_steps_by_the_gradient_at_the_adapted_parameters(inner_steps):
    tasks = family(3)
    rates = {"meta_optimizer": "sgd", "meta_learning_rate": 0.2, "anneal": False}
    plan = fw.MetaConfig("fomaml", **PLAIN, **rates, inner_steps=inner_steps, tasks_per_step=3, query_size=4)
    found, losses = meta_step(tasks, plan, 2)
    explicit = Explicit(tasks)
    numbers = explicit.start
    for number in range(2):
        gradients, queried = [], []
        for episode in draw(plan, [12] * 3, number):
            assert len(episode.query) == 4
            end = explicit.adapted(numbers, episode, 0.3)
            gradients.append(explicit.gradient(end, episode.task, episode.query))
            with torch.no_grad():
                given = batch(explicit.tasks, episode.task, episode.query)
                parameters = dict(zip(explicit.names, end, strict=True))
                queried.append(float(functional_call(explicit.model, parameters, (), given).loss))
        assert losses[number]["after"] == pytest.approx(sum(queried) / 3, abs=1e-12)
        numbers = [n - 0.2 * g for n, g in zip(numbers, mean(gradients), strict=True)]
    assert_close(found, numbers, explicit.start)


def test_fomaml_with_adam_on_both_sides():
    """Inner: no momentum, second moments carried from task to task. Outer: Adam as Kingma & Ba have it."""
    tasks = family(3)
    plan = fw.MetaConfig("fomaml", batch_size=3, inner_steps=2, tasks_per_step=3, clip=0.0, anneal=False, seed=1,
                         inner_learning_rate=0.02, meta_learning_rate=0.01)  # fmt: skip
    found, _ = meta_step(tasks, plan, 3)
    explicit = Explicit(tasks)
    numbers, eps = explicit.start, 1e-8
    second, count = [torch.zeros_like(n) for n in numbers], 0
    outer_first, outer_second = ([torch.zeros_like(n) for n in numbers] for _ in range(2))
    for number in range(3):
        gradients = []
        for episode in draw(plan, [12] * 3, number):
            end = numbers
            for rows in episode.support:
                g, count = explicit.gradient(end, episode.task, rows), count + 1
                second = [0.999 * v + 0.001 * x * x for v, x in zip(second, g, strict=True)]
                unbiased = [(v / (1 - 0.999**count)).sqrt() + eps for v in second]
                end = [n - 0.02 * x / v for n, x, v in zip(end, g, unbiased, strict=True)]
            gradients.append(explicit.gradient(end, episode.task, episode.query))
        g = mean(gradients)
        outer_first = [0.9 * m + 0.1 * x for m, x in zip(outer_first, g, strict=True)]
        outer_second = [0.999 * v + 0.001 * x * x for v, x in zip(outer_second, g, strict=True)]
        numbers = [
            n - 0.01 * (m / (1 - 0.9 ** (number + 1))) / ((v / (1 - 0.999 ** (number + 1))).sqrt() + eps)
            for n, m, v in zip(numbers, outer_first, outer_second, strict=True)
        ]
    assert_close(found, numbers, explicit.start, tolerance=1e-9)


def test_gradients_are_clipped_to_a_norm():
    tasks = family(2)
    settings = {**PLAIN, "clip": 1e-3, "inner_learning_rate": 1.0}
    plan = fw.MetaConfig(**settings, inner_steps=1, tasks_per_step=1, meta_learning_rate=1.0, anneal=False)
    found, _ = meta_step(tasks, plan, 1)
    start = Explicit(tasks).start
    moved = torch.cat([(a - s).flatten() for a, s in zip(found, start, strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_several_methods_are_adapted_at_their_own_rates():
    """A prefix at the rate given and a memory at the usual one."""
    what = [CONFIG, fw.MemoryConfig(rank=2)]
    _, tuning = precise(what)
    step = MetaStep(tuning, fw.MetaConfig(inner_learning_rate=0.01), list(family(2).items()), COLLATE)
    assert [g["lr"] for g in step.inner.param_groups] == [0.01, 1e-3]
    assert [g["lr"] for g in step.outer.param_groups] == [1.0]
    assert len({id(p) for g in step.inner.param_groups for p in g["params"]}) == len(list(tuning.parameters()))
    # Adam moves the start by each method's own rate as well.
    step = MetaStep(tuning, fw.MetaConfig("fomaml", meta_learning_rate=0.05), list(family(2).items()), COLLATE)
    assert [g["lr"] for g in step.outer.param_groups] == [0.05, 1e-3]


@given(
    st.sampled_from(["reptile", "fomaml"]), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3),
    st.lists(st.integers(0, 9), min_size=2, max_size=6), st.integers(0, 99), st.integers(0, 1000),
)  # fmt: skip
def test_what_is_drawn(algorithm, per_step, inner, size, more, seed, step):
    plan = fw.MetaConfig(algorithm, tasks_per_step=per_step, inner_steps=inner, batch_size=size, seed=seed)
    sizes = [plan.least + m for m in more]
    episodes = draw(plan, sizes, step)
    assert draw(plan, sizes, step) == episodes
    assert len(episodes) == min(per_step, len(sizes)) == len({e.task for e in episodes})
    for episode in episodes:
        assert [len(b) for b in episode.support] == [size] * inner
        assert all(len(set(b)) == size for b in episode.support)  # none twice in a batch
        support = [i for b in episode.support for i in b]
        assert len(episode.query) == len(set(episode.query)) == (size if algorithm == "fomaml" else 0)
        assert not set(support) & set(episode.query)
        assert all(0 <= i < sizes[episode.task] for i in [*support, *episode.query])
        enough = sizes[episode.task] - plan.query  # before any is taken again, all are
        assert len(set(support)) == min(enough, inner * size)


def test_every_task_and_example_has_its_turn():
    plan = fw.MetaConfig("fomaml", tasks_per_step=2, batch_size=2)
    episodes = [e for step in range(200) for e in draw(plan, [5, 8, 11], step)]
    for task, size in enumerate((5, 8, 11)):
        own = [e for e in episodes if e.task == task]
        assert 100 < len(own) < 170  # two of three
        for used in ([i for e in own for b in e.support for i in b], [i for e in own for i in e.query]):
            assert set(used) == set(range(size))
    assert draw(plan, [9] * 3, 0) != draw(plan, [9] * 3, 1)
    assert draw(plan, [9] * 3, 0) != draw(fw.MetaConfig("fomaml", tasks_per_step=2, batch_size=2, seed=1), [9] * 3, 0)
