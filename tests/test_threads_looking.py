"""What looks at a model, or tries something on it, does so in its own thread: others' passes are what they are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

import foreword as fw
import zoo
from foreword._interface import SLOT, only_slots, slot_of
from foreword._stacks import positioned_stacks
from foreword._text_positions import placed
from foreword.evaluate.inside._taps import tapped
from foreword.shares import measured_shares

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
OTHER = torch.tensor([[3, 4, 10]])


@pytest.fixture
def model():
    made = zoo.build("llama")
    prefix = fw.Prefix.from_tensors(made, zoo.random_prefix(made, fw.sites(made), 4, 1))
    fw.attach(made, prefix)
    return made


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def elsewhere(work, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *args).result()


def test_shares_are_of_this_threads_passes(model):
    want = fw.attention_shares(model, input_ids=PROMPT)
    with measured_shares(model) as found:
        logits(model, PROMPT)
        elsewhere(logits, model, OTHER)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_two_threads_measure_at_once(model):
    want = [fw.attention_shares(model, input_ids=ids) for ids in (PROMPT, OTHER)]
    barrier = threading.Barrier(2)

    def measured(ids):
        found = []
        for _ in range(20):
            barrier.wait()
            found.append(fw.attention_shares(model, input_ids=ids))
        return found

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(measured, (PROMPT, OTHER)))
    for each, shares in zip(got, want, strict=True):
        assert all(torch.equal(found[name], shares[name]) for found in each for name in shares)


def test_blocks_of_one_thread_stand_in_each_other(model):
    want = fw.attention_shares(model, input_ids=PROMPT)
    with measured_shares(model) as outer:
        with measured_shares(model, by_token=True) as inner:
            logits(model, PROMPT)
        logits(model, OTHER)
    assert all(torch.allclose(inner[name].sum(-1), want[name]) for name in want)
    assert all(found.shape[2] == OTHER.shape[1] for found in outer.values())


@pytest.mark.parametrize("block", ["without slots", "placed", "tapped"])
def test_a_trial_is_nothing_to_other_threads(model, block):
    names = [s.name for s in fw.sites(model)]
    want = logits(model, PROMPT)
    with {
        "without slots": lambda: only_slots(model, lambda _: None),
        "placed": lambda: placed(positioned_stacks(model, fw.sites(model)), (7,)),
        "tapped": lambda: tapped(model, names),
    }[block]() as taps:
        assert torch.equal(elsewhere(logits, model, PROMPT), want)
        assert block != "tapped" or all(tap.out is None for tap in taps.values())
        assert torch.equal(logits(model, PROMPT), want) == (block == "tapped")
    assert torch.equal(logits(model, PROMPT), want)


def test_a_text_is_made_into_a_task_while_another_is_in_use(tokenizer):
    model = zoo.build("llama")
    library = fw.Library(model)
    library.add("a", fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), 4, 1)))
    with library.use("a"):
        want = logits(model, PROMPT)
    stop = threading.Event()

    def asked():
        with library.use("a"):
            return [torch.equal(logits(model, PROMPT), want) for _ in iter(stop.is_set, True)]

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(asked)
        try:
            for text in ("one two", "three four five", "six"):
                fw.Prefix.from_text(model, tokenizer, text)
        finally:
            stop.set()
        assert len(answers.result()) > 3 and all(answers.result())
    library.detach()


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_compiled_in_place_is_looked_at(model, whole):
    want = fw.attention_shares(model, input_ids=PROMPT)
    if whole:
        model.compile(backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    plain = logits(model, PROMPT)
    found = fw.attention_shares(model, input_ids=PROMPT)
    assert all(torch.allclose(found[name], want[name], atol=1e-6) for name in want)
    assert fw.sites(model) and torch.equal(logits(model, PROMPT), plain)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_prompt_that_runs_the_model_inside_compiled_code(how):
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.PromptConfig(length=3, init="random"))
    want = logits(model, PROMPT)
    called = torch.compile(model, backend="eager") if how == "wrapped" else model
    if how == "in place":
        model.compile(backend="eager")
    out = called(input_ids=PROMPT, labels=PROMPT)
    torch.testing.assert_close(out.logits, want)
    out.loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in tuning.parameters())


def test_a_model_that_is_compiled_as_a_whole_is_looked_at(model):
    compiled = torch.compile(model, backend="eager")
    plain, want = logits(compiled, PROMPT), fw.attention_shares(model, input_ids=PROMPT)
    with measured_shares(model) as found:
        logits(compiled, PROMPT)
        found = {name: share.clone() for name, share in found.items()}
    assert all(torch.allclose(found[name], want[name], atol=1e-6) for name in want)
    assert torch.equal(logits(compiled, PROMPT), plain)


def test_blocks_of_threads_end_in_any_order(model):
    modules = {s.name: model.get_submodule(s.name) for s in fw.sites(model)}
    before, want = {n: slot_of(m) for n, m in modules.items()}, logits(model, PROMPT)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # from now on, slots stand on modules as well
    with ExitStack() as first:
        first.enter_context(only_slots(model, lambda _: None))
        with ThreadPoolExecutor(1) as pool:
            second = ExitStack()
            pool.submit(lambda: second.enter_context(measured_shares(model))).result()
            first.close()
            assert torch.equal(logits(model, PROMPT), want)
            pool.submit(second.close).result()
    assert all(m.__dict__[SLOT] is before[n] for n, m in modules.items())
    assert torch.equal(logits(model, PROMPT), want)
