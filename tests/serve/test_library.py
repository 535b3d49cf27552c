"""Library: many tasks on one model, chosen by context."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

import foreword as fw
import zoo

LENGTHS = {"short": 1, "middle": 3, "long": 6}


def make(model, length, seed, **kwargs):
    return fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), length, seed), **kwargs)


def filled(name="llama"):
    """A library of three tasks, and what the model says with each attached alone (None: with none)."""
    model, arguments = zoo.build(name), zoo.inputs(name, batch=3)
    prefixes = {task: make(model, n, seed) for seed, (task, n) in enumerate(LENGTHS.items())}
    alone = {None: zoo.logits(model, **arguments)}
    for task, prefix in prefixes.items():
        tuning = fw.attach(model, prefix)
        alone[task] = zoo.logits(model, **arguments)
        tuning.detach()
    library = fw.Library(model)
    for task, prefix in prefixes.items():
        library.add(task, prefix)
    return library, arguments, alone


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "gptoss", "deepseek", "bert", "t5", "bart"])
def test_one_task_and_one_task_a_row(name):
    library, arguments, alone = filled(name)
    model = library.model
    assert torch.equal(zoo.logits(model, **arguments), alone[None])
    for task in (*LENGTHS, None):
        with library.use(task):
            close(zoo.logits(model, **arguments), alone[task])
    for tasks in (["short", "long", "middle"], ["long", None, "short"], [None, "middle", "middle"], ["long"] * 3):
        with library.use(tasks):
            got = zoo.logits(model, **arguments)
        for row, task in enumerate(tasks):
            close(got[row], alone[task][row])
    assert torch.equal(zoo.logits(model, **arguments), alone[None])


def test_rows_without_a_task_are_the_base_model_with_padding_too():
    library, arguments, _ = filled()
    model, mask = library.model, torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, :5] = 0
    base = zoo.logits(model, **arguments, attention_mask=mask)
    with library.use([None, None, "long"]):
        got = zoo.logits(model, **arguments, attention_mask=mask)
    close(got[0], base[0], 1e-6)
    close(got[1, 3:], base[1, 3:], 1e-6)
    assert got.isfinite().all() and not torch.allclose(got[2, 5:], base[2, 5:], atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "gemma3"])
def test_generation_keeps_each_rows_task(name):
    library, _, _ = filled(name)
    model, ids = library.model, zoo.ids(3, 5)
    tasks = ["long", None, "short"]

    def generate(**kwargs):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **kwargs)

    for how in ({"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}):
        many = how.get("num_return_sequences", 1)
        alone = {}
        for task in tasks:
            with library.use(task):
                alone[task] = generate(**how)
        with library.use(tasks):
            got = generate(**how)
        for row, task in enumerate(tasks):
            chosen = slice(row * many, (row + 1) * many)
            assert torch.equal(got[chosen], alone[task][chosen])
    with library.use(tasks):
        sampled = generate(do_sample=True, num_return_sequences=4)
    assert sampled.shape[0] == 12


def test_threads_read_their_own_task():
    library, arguments, alone = filled()
    failures, barrier = [], threading.Barrier(4)

    def work(task):
        barrier.wait()
        for _ in range(5):
            with library.use(task):
                got = zoo.logits(library.model, **arguments)
            if not torch.allclose(got, alone[task], atol=1e-4):
                failures.append(task)

    threads = [threading.Thread(target=work, args=(t,)) for t in (*LENGTHS, None)]
    for t in threads:
        t.start()
    with library.use("short"):
        for t in threads:
            t.join()
    assert not failures


def test_asyncio_tasks_read_their_own_task():
    library, arguments, alone = filled()

    async def work(task):
        with library.use(task):
            for _ in range(3):
                await asyncio.sleep(0)
                close(zoo.logits(library.model, **arguments), alone[task])

    async def main():
        await asyncio.gather(*(work(t) for t in (*LENGTHS, None)))

    asyncio.run(main())


def test_nested_blocks_and_errors_leave_the_outer_choice():
    library, arguments, alone = filled()
    with library.use("long"):
        with library.use(None):
            close(zoo.logits(library.model, **arguments), alone[None])
        with pytest.raises(RuntimeError), library.use("short"):
            raise RuntimeError
        close(zoo.logits(library.model, **arguments), alone["long"])


def test_names():
    library, _, _ = filled()
    assert library.names == list(LENGTHS) and "long" in library and len(library) == 3
    assert library["long"].longest == 6
    for bad, message in (("midle", "did you mean middle"), ("zzz", "there are: short, middle, long")):
        with pytest.raises(fw.ConfigError, match=f"no task is named '{bad}'; {message}"), library.use(bad):
            pass
        with pytest.raises(fw.ConfigError, match=message), library.use(["long", bad]):
            pass
        with pytest.raises(fw.ConfigError, match=message):
            library.remove(bad)
    with pytest.raises(fw.ConfigError, match="names no task"), library.use([]):
        pass
    with pytest.raises(fw.ConfigError, match="needs a name"):
        library.add("", library["long"])


def test_the_wrong_number_of_rows_is_an_error():
    library, arguments, _ = filled()
    for tasks in (["long", "short"], ["long", "short", None, None]):
        with pytest.raises(fw.AttachError, match=f"3 rows but {len(tasks)} tasks"), library.use(tasks):
            zoo.logits(library.model, **arguments)


def test_a_replaced_or_removed_task_stays_where_it_is_in_use():
    library, arguments, alone = filled()
    model, other = library.model, make(zoo.build("llama"), 4, seed=9)
    with library.use("long"):
        library.add("long", other)
        library.remove("short")
        close(zoo.logits(model, **arguments), alone["long"])
    with library.use("long"):
        assert not torch.allclose(zoo.logits(model, **arguments), alone["long"], atol=1e-2)
    assert library.names == ["middle", "long"]


def test_prefixes_of_another_convention_or_model():
    library, arguments, alone = filled()
    shifted = library["middle"].shift(9)
    library.add("shifted", shifted)  # a rotary prefix is turned back
    with library.use("shifted"):
        close(zoo.logits(library.model, **arguments), alone["middle"], 1e-3)
    with pytest.raises(fw.MismatchError, match="other weights"):
        library.add("foreign", make(zoo.build("llama", seed=1), 2, 0))
    library.add("foreign", make(zoo.build("llama", seed=1), 2, 0), force=True)
    gpt2 = zoo.build("gpt2")
    with pytest.raises(fw.MismatchError, match="no attention site"):
        library.add("gpt2", make(gpt2, 2, 0))
    prefix = make(gpt2, 2, 0, position_offset=2)
    with pytest.raises(fw.MismatchError, match="'late' expects text at position 2"):
        fw.Library(gpt2).add("late", prefix)


@pytest.mark.parametrize("gate", ["head", "zero", "input"])
def test_gates_work_alone_and_mixed(gate):
    model, ids = zoo.build("llama"), zoo.ids(3)
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", gate=gate))
    with torch.no_grad():
        for p in tuning.parameters():
            p.add_(0.3)
    want, prefix = zoo.logits(model, input_ids=ids), tuning.bake()
    tuning.detach()
    library = fw.Library(model)
    library.add("gated", prefix)
    with library.use("gated"):
        close(zoo.logits(model, input_ids=ids), want)
    base = zoo.logits(model, input_ids=ids)
    with library.use(["gated", None, "gated"]):
        got = zoo.logits(model, input_ids=ids)
    for row, expected in enumerate((want, base, want)):
        close(got[row], expected[row])


def test_tasks_at_different_sites():
    library, arguments, alone = filled()
    model, prefix = library.model, library["long"]
    first = next(iter(prefix.keys))
    library.add("first", fw.Prefix({first: prefix.keys[first]}, {first: prefix.values[first]}, prefix.sites[:1]))
    with library.use("first"):
        want = zoo.logits(model, **arguments)
    with library.use(["first", "long", None]):
        got = zoo.logits(model, **arguments)
    for row, expected in enumerate((want, alone["long"], alone[None])):
        close(got[row], expected[row])


def test_inference_mode_half_precision_and_detaching():
    library, arguments, alone = filled()
    model = library.model
    with torch.inference_mode(), library.use(["long", None, "short"]):
        got = model(**arguments).logits
    close(got[0].clone(), alone["long"][0])
    assert library.detach() is model
    with pytest.raises(fw.AttachError, match="not on its model"):
        library.detach()
    assert torch.equal(zoo.logits(model, **arguments), alone[None])
    half = fw.Library(model.bfloat16())
    half.add("long", make(zoo.build("llama"), 6, 2))
    assert half["long"].keys["model.layers.0.self_attn"].dtype == torch.bfloat16
    with half.use(["long", None, "long"]):
        got = zoo.logits(model, **arguments)
    close(got[0].float(), alone["long"][0], 0.2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_texts_are_written_on_each_with_its_task(name):
    library, _, _ = filled(name)
    library.model.generation_config.eos_token_id = None
    tokenizer = zoo.tokenizer()
    texts, tasks = ["The film", "There is a place in the city", "Write"], ["long", None, "short"]
    options = {"max_new_tokens": 8, "do_sample": False}
    got = library.generate(tokenizer, texts, tasks, **options)
    assert got == [
        library.generate(tokenizer, [text], task, **options)[0] for text, task in zip(texts, tasks, strict=True)
    ]
    several = library.generate(tokenizer, texts, tasks, num_beams=2, num_return_sequences=2, **options)
    alone = [
        library.generate(tokenizer, [t], [k], num_beams=2, num_return_sequences=2, **options)
        for t, k in zip(texts, tasks, strict=True)
    ]
    assert several == [answer for answers in alone for answer in answers]
    assert library.generate(tokenizer, texts, **options) != got  # the base model
    for arguments, message in (
        (([],), "at least one text"),
        (("The film",), "at least one text"),
        ((texts, ["long"]), "1 tasks for 3 texts"),
        ((["The film", ""], "long"), "text 1 has no token"),
        ((texts, "lnog"), "did you mean long"),
    ):
        with pytest.raises(fw.ConfigError, match=message):
            library.generate(tokenizer, *arguments, **options)
    library.detach()
