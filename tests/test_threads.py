"""Tasks, conditions and prefixes in several threads and contexts at once: each gets its own, or an error."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer

import foreword as fw
import zoo
from foreword.tuning import tuning_of
from foreword.visibility import parse

GREEDY = {"max_new_tokens": 6, "do_sample": False}
SIZE = 5


def prefix_for(model, seed=0, visible="all", length=6):
    tensors = zoo.random_prefix(model, fw.sites(model), length, seed)
    return replace(fw.Prefix.from_tensors(model, tensors), visible=parse(visible))


def together(*works):
    """Run some functions in a thread each, at the same time; what each returned, or its error."""
    found, barrier = [None] * len(works), threading.Barrier(len(works))

    def run(i, work):
        barrier.wait()
        try:
            found[i] = work()
        except Exception as exc:
            found[i] = exc

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def in_thread(work, *args):
    return together(lambda: work(*args))[0]


@pytest.fixture
def library():
    made = fw.Library(zoo.build("llama"))
    for seed, (name, visible) in enumerate([("a", "all"), ("b", "first:8"), ("c", "infix")]):
        made.add(name, prefix_for(made.model, seed, visible))
    return made


def scores(model, ids=None):
    """Of the first token that generate writes: what two prefixes differ in for certain."""
    out = model.generate(
        zoo.ids(1, 7) if ids is None else ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    return out.logits[1]


# ---------------------------------------------------------------- Library.use


@pytest.mark.parametrize("call", [scores, lambda model: zoo.logits(model, input_ids=zoo.ids(1, 7))])
def test_a_thread_that_a_block_starts_is_handed_the_task_or_raises(library, call):
    model = library.model
    base = call(model)
    with library.use("a"):
        want = call(model)
        assert not torch.allclose(want, base, atol=1e-3)
        refused = in_thread(call, model)
        assert isinstance(refused, fw.AttachError) and "copy_context().run" in str(refused)
        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(fw.AttachError, match=r"library\.use\(None\)"):
                pool.submit(call, model).result()
            assert torch.equal(pool.submit(contextvars.copy_context().run, call, model).result(), want)

        def chosen(task):
            with library.use(task):
                return call(model)

        assert torch.equal(in_thread(chosen, "a"), want)
        assert torch.equal(in_thread(chosen, None), base)
    assert torch.equal(in_thread(call, model), base)  # no block is open


def test_every_task_at_once_beside_each_other(library):
    model, ids = library.model, zoo.ids(2, 6)

    def work(tasks):
        with library.use(tasks):
            return [model.generate(ids, **GREEDY) for _ in range(4)]

    choices = ["a", "b", "c", None, ["a", "c"], [None, "b"]]
    want = [work(c)[0] for c in choices]
    assert len({str(w.tolist()) for w in want}) == len(choices)
    for found, expected in zip(together(*(lambda c=c: work(c) for c in choices)), want, strict=True):
        assert all(torch.equal(f, expected) for f in found)


def test_tasks_of_asyncio_take_a_block_over(library):
    model = library.model
    base = scores(model)

    async def ask():
        await asyncio.sleep(0)
        return scores(model)

    async def main():
        with library.use("a"):
            want = scores(model)
            inside = asyncio.create_task(ask())
            threaded = await asyncio.to_thread(scores, model)
            with pytest.raises(fw.AttachError, match="nobody chose"):
                await asyncio.get_running_loop().run_in_executor(None, scores, model)
            assert torch.equal(await inside, want) and torch.equal(threaded, want)
        late = contextvars.copy_context()
        assert torch.equal(await asyncio.create_task(ask(), context=late), base)

    asyncio.run(main())


def test_a_thread_keeps_its_task_after_the_block(library):
    """Handed over, it is the thread's own; and what began as the base model stays it, whoever opens a block."""
    model, began, go = library.model, threading.Event(), threading.Event()

    class Wait:
        def __call__(self, ids, scores):
            began.set()
            assert go.wait(60)
            return scores

    def write():
        return model.generate(zoo.ids(1, 7), logits_processor=[Wait()], **GREEDY)

    go.set()
    base = write()
    with library.use("a"):
        want = write()
    found = []
    for inside, expected in ((True, want), (False, base)):
        began.clear()
        go.clear()
        if inside:
            with library.use("a"):
                context = contextvars.copy_context()
                thread = threading.Thread(target=context.run, args=(lambda: found.append(write()),))
                thread.start()
                assert began.wait(60)
            library.remove("a")  # in the middle of its generation
            go.set()
        else:
            thread = threading.Thread(target=lambda: found.append(write()))
            thread.start()
            assert began.wait(60)
            with library.use("b"):
                go.set()
                thread.join()
        thread.join()
        assert torch.equal(found.pop(), expected)


def test_who_reads_a_streamer_is_told(library):
    """transformers' own pattern: the thread that generates would die, and its reader wait for ever."""
    model, tokenizer = library.model, zoo.tokenizer()

    def streamed(run):
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        options = {"streamer": streamer, **GREEDY}
        thread = threading.Thread(target=run, args=(model.generate, zoo.ids(1, 7)), kwargs=options)
        thread.start()
        try:
            return "".join(streamer)
        finally:
            thread.join()

    def plainly(function, *args, **kwargs):
        with pytest.raises(fw.AttachError):
            function(*args, **kwargs)

    with library.use("a"):
        want = tokenizer.decode(model.generate(zoo.ids(1, 7), **GREEDY)[0])
        assert streamed(contextvars.copy_context().run) == want
        with pytest.raises(fw.AttachError, match="open in another context"):
            streamed(plainly)

        async def main():
            streamer = AsyncTextIteratorStreamer(tokenizer, timeout=60)
            thread = threading.Thread(
                target=plainly, args=(model.generate, zoo.ids(1, 7)), kwargs={"streamer": streamer, **GREEDY}
            )
            thread.start()
            with pytest.raises(fw.AttachError, match="open in another context"):
                async for _ in streamer:
                    pass
            thread.join()

        asyncio.run(main())
    library.detach()
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", tasks=("a", "b")))
    with tuning.given(task="a"), pytest.raises(fw.AttachError, match=r"none was given.*open in another context"):
        streamed(plainly)


def test_a_generate_of_the_models_own_comes_back():
    model = zoo.build("llama")
    own = model.generate
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.generate = counted
    library = fw.Library(model)
    library.add("c", prefix_for(model, 0, "infix"))
    with library.use("c"):
        model.generate(zoo.ids(1, 5), **GREEDY)
    library.detach()
    assert model.generate is counted and calls == [1]


# ---------------------------------------------------------------- what rows are given


def stirred(tuning):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return tuning


@pytest.mark.parametrize("config", [
    {"tasks": ("a", "b", "c")},
    {"tasks": ("a", "b", "c"), "visible": "first:8", "gate": "head"},
    {"tasks": ("a", "b", "c"), "visible": "infix:1"},
    {"condition": SIZE, "reparam": "mlp", "hidden": 8},
])  # fmt: skip
@pytest.mark.parametrize("by_call", [False, True])
def test_what_is_given_holds_in_its_own_thread(config, by_call):
    model, ids = zoo.build("llama"), zoo.ids(2, 7)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(length=3, init="random", **config)))
    if "tasks" in config:
        choices = [{"task": t} for t in ("a", "b", ["c", "a"], "b")]
    else:
        vectors = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(0))
        choices = [{"condition": v} for v in vectors]

    def work(given):
        if by_call:
            return [zoo.logits(model, input_ids=ids, boundary=4, **given) for _ in range(6)]
        with tuning.given(**given):
            return [model.generate(ids, **GREEDY) for _ in range(6)]

    want = [work(c)[0] for c in choices]
    assert not torch.equal(want[0], want[1])
    for found, expected in zip(together(*(lambda c=c: work(c) for c in choices)), want, strict=True):
        assert all(torch.equal(f, expected) for f in found)
    with tuning.given(**choices[0]):
        refused = in_thread(lambda: model.generate(ids, **GREEDY))
        assert isinstance(refused, fw.AttachError) and "copy_context().run" in str(refused)
        handed = in_thread(contextvars.copy_context().run, lambda: model.generate(ids, **GREEDY))
        with tuning.given(**choices[1]):
            inner = model.generate(ids, **GREEDY)
        outer = model.generate(ids, **GREEDY)
    for given, found in ((choices[0], handed), (choices[1], inner), (choices[0], outer)):
        with tuning.given(**given):
            assert torch.equal(found, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("within", [True, False])
def test_the_backward_of_each_pass_has_what_it_was_given(checkpointing, within):
    """Two passes before their backward, which runs in another thread, with another block open there."""
    model, ids = zoo.build("llama").train(), zoo.ids(2, 6)
    tuning = stirred(
        fw.attach(model, fw.PrefixConfig(length=3, init="random", condition=SIZE, reparam="mlp", hidden=8))
    )
    vectors = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0))
    want = []
    for vector in vectors:
        model(input_ids=ids, labels=ids, condition=vector).loss.backward()
    want = [p.grad.clone() for p in tuning.parameters()]
    for parameter in tuning.parameters():
        parameter.grad = None
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses = []
    for vector in vectors:
        if within:
            with tuning.given(condition=vector):
                losses.append(model(input_ids=ids, labels=ids).loss)
        else:
            losses.append(model(input_ids=ids, labels=ids, condition=vector).loss)

    def backward():
        with tuning.given(condition=-vectors[0]):
            sum(losses).backward()

    assert in_thread(backward) is None
    for a, parameter in zip(want, tuning.parameters(), strict=True):
        torch.testing.assert_close(a, parameter.grad, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- an attached prefix


@pytest.mark.parametrize("visible", ["first:8", "window:2:9", "infix", "infix:2", "all"])
@pytest.mark.parametrize("trainable", [False, True])
def test_one_prefix_in_several_threads(visible, trainable):
    model = zoo.build("llama")
    fw.attach(model, prefix_for(model, 0, visible), trainable=trainable)
    prompts = [zoo.ids(1, n, seed=n) for n in (5, 9, 14, 9)]

    def work(ids):
        return [model.generate(ids, **GREEDY) for _ in range(5)]

    want = [work(ids)[0] for ids in prompts]
    for found, expected in zip(together(*(lambda i=i: work(i) for i in prompts)), want, strict=True):
        assert all(torch.equal(f, expected) for f in found)


def test_training_in_one_thread_beside_reading_in_others():
    """Passes of different kinds don't meet: gradients are those of the pass alone."""
    model, ids = zoo.build("llama"), zoo.ids(2, 8)
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix:1"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()

    def train():
        found = []
        for _ in range(5):
            loss = model(input_ids=ids, boundary=3).logits.log_softmax(-1)[..., 7].sum()
            found.append(torch.autograd.grad(loss, list(tuning.parameters())))
        return found

    def read(n):
        return [zoo.logits(model, input_ids=zoo.ids(1, n, seed=n), boundary=2) for _ in range(5)]

    want = train()[0], read(6)[0], read(8)[0]
    found = together(train, lambda: read(6), lambda: read(8))
    for gradients in found[0]:
        for a, b in zip(gradients, want[0], strict=True):
            torch.testing.assert_close(a, b)
    for logits, expected in zip(found[1:], want[1:], strict=True):
        assert all(torch.equal(f, expected) for f in logits)


def test_a_copy_of_the_model_is_in_no_block():
    """Also after a pass with gradients, whose prefix has a graph."""
    model, ids = zoo.build("llama"), zoo.ids(1, 6)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(length=3, init="random", tasks=("a", "b"), visible="infix:1")))
    model(input_ids=ids, labels=ids, task="a").loss.backward()
    with tuning.given(task="b"):
        want = model.generate(ids, **GREEDY)
        other = copy.deepcopy(model)
        with pytest.raises(fw.AttachError, match="none was given"):
            other.generate(ids, **GREEDY)
    own = tuning_of(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with own.given(task="b"):
        assert torch.equal(other.generate(ids, **GREEDY), want)
    assert torch.equal(
        pickle.loads(pickle.dumps(own)).bake(task="b").keys[own.sites[0].name],
        own.bake(task="b").keys[own.sites[0].name],
    )
    own.detach()
    assert not other._forward_pre_hooks and "generate" not in other.__dict__
