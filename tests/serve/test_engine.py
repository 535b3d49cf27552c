"""The engine: an answer is what its request gets alone, whatever else runs, comes, goes or fails."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import engines
import pytest
import torch
from engines import Kept, alone, engine, greedy, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.errors import OverloadedError
from foreword.serve.admission import Limits
from foreword.serve.engine import Engine
from foreword.serve.library import Library
from foreword.serve.request import Sampling

DECODERS = [n for n in zoo.DECODERS if n != "qwen3next"]


@pytest.mark.parametrize("name", DECODERS)
def test_mixed_tasks_are_written_as_alone(name):
    held = engines.library(name)
    asked = [(prompt(5, 1), "long"), (prompt(11, 2), None), (prompt(3, 3), "short"), (prompt(8, 4), "middle")]
    want = [alone(held, p, t, 8) for p, t in asked]
    with engine(held) as running:
        got = running.generate([p for p, _ in asked], greedy(), [t for _, t in asked])
    assert [w[0].tokens for w in got] == want
    assert all(w[0].finish == "length" for w in got)


@pytest.mark.parametrize(
    ("name", "message"),
    [("t5", "reads its input with an encoder"), ("qwen3next", "keeps a state besides"), ("bert", "no language-model")],
)
def test_models_whose_rows_cannot_be_written_together_are_refused(name, message):
    held = Library(zoo.build(name))
    with pytest.raises(fw.UnsupportedModelError, match=message):
        Engine(held, zoo.tokenizer())


def test_a_model_that_lets_rows_see_each_other_is_refused():
    held = engines.library()

    def mix(module, args, output):  # every row gets a part of the others
        return output + 0.1 * output.mean(0, keepdim=True)

    handle = held.model.model.layers[0].mlp.register_forward_hook(mix)
    with pytest.raises(fw.UnsupportedModelError, match="other scores beside another row than alone"):
        Engine(held, zoo.tokenizer())
    handle.remove()
    Engine(held, zoo.tokenizer())


# ---------------------------------------------------------------- joining and leaving


@cache
def _shared():
    held = engines.library()
    return held, Engine(held, zoo.tokenizer(), Limits(rows=5, queue=64, step_tokens=12)), {}


_requests = st.lists(
    st.tuples(
        st.integers(0, 12),  # the step that it comes at
        st.integers(1, 20),  # tokens of the prompt
        st.integers(1, 9),  # tokens of the answer
        st.sampled_from([None, "short", "middle", "long"]),
        st.sampled_from([1.0, 0.5]),
        st.integers(1, 2),  # n
        st.none() | st.integers(0, 6),  # steps until it is cancelled
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=40)
@given(_requests)
def test_joining_and_leaving_changes_no_answer(plan):
    held, made, known = _shared()
    running, step = [], 0
    while running == [] or step <= max(r[0] for r in plan) or not all(k.ended.is_set() or c for *_, k, c in running):
        for length, tokens, task, strength, n, gone in (r[1:] for r in plan if r[0] == step):
            kept = Kept(n)
            request = made.submit(prompt(length, length), greedy(tokens, n=n, strength=strength), task, kept)
            running.append(
                [(length, tokens, task, strength), request, None if gone is None else step + gone, kept, False]
            )
        for entry in running:
            if entry[2] == step and not entry[3].ended.is_set():
                made.cancel(entry[1])
                entry[4] = True
        made.step()
        step += 1
        stats = made.stats
        assert stats.rows <= 5 and step < 400
        for lane in made._work.lanes:
            assert lane.padding <= made._work.lanes.most_padding or len({a.request for a in lane.answers}) == 1
            assert len(lane.cache) == len(lane.answers)
    assert made.stats.rows == made.stats.waiting == made.stats.lanes == 0
    for (length, tokens, task, strength), _, _, kept, cancelled in running:
        key = (length, task, strength)
        if key not in known:
            prefix = held[task] if task is not None else None
            tuning = None
            if prefix is not None and strength != 1:
                model = zoo.build("llama")
                tuning = fw.attach(model, prefix, strength=strength)
                ids = torch.tensor([prompt(length, length)])
                out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
                known[key] = out[0, length:].tolist()
                tuning.detach()
            else:
                known[key] = alone(held, prompt(length, length), task, 9)
        for got in kept.tokens:
            assert got == known[key][: len(got)]
            assert cancelled or len(got) == tokens


def test_long_prompts_are_read_by_parts_while_others_are_written():
    held = engines.library()
    made = Engine(held, zoo.tokenizer(), Limits(rows=4, step_tokens=10))
    short, long = Kept(), Kept()
    made.submit(prompt(4, 1), greedy(12), "short", short)
    made.step()
    assert len(short.told) == 2  # its first token, and one more
    made.submit(prompt(47, 2), greedy(4), "long", long)
    told = []
    while not long.ended.is_set():
        made.step()
        told.append((len(short.told), len(long.told)))
    assert told[:4] == [(3, 0), (4, 0), (5, 0), (6, 0)] and told[4] == (7, 2)
    while not short.ended.is_set():
        made.step()
    assert short.tokens == [alone(held, prompt(4, 1), "short", 12)]
    assert long.tokens == [alone(held, prompt(47, 2), "long", 4)]


def test_rows_of_very_different_lengths_are_written_apart():
    held = engines.library()
    made = Engine(held, zoo.tokenizer(), Limits(rows=16, step_tokens=128))
    most = made._work.lanes.most_padding
    kept = [Kept() for _ in range(16)]
    for i, sink in enumerate(kept):
        made.submit(prompt(100 if i % 2 else 4, i), greedy(6), "middle", sink)
    lanes = 0
    while not all(k.ended.is_set() for k in kept):
        made.step()
        lanes = max(lanes, made.stats.lanes)
        assert made.stats.padding <= most * max(1, made.stats.lanes)
    assert most < 8 * 96  # all of them in one lane would have been more
    assert lanes >= 2
    for i, sink in enumerate(kept):
        assert sink.tokens == [alone(held, prompt(100 if i % 2 else 4, i), "middle", 6)]


def test_whoever_waits_longest_is_next_and_memory_is_promised_first():
    made = Engine(engines.library(), zoo.tokenizer(), Limits(rows=4, columns=60))
    order = []

    def ask(name, length, tokens, n=1):
        made.submit(prompt(length), greedy(tokens, n=n), None, lambda p: p.finish and order.append(name))

    ask("first", 10, 20)  # 30 columns
    ask("big", 20, 25)  # 45: waits for the first
    ask("small", 4, 2)  # would fit, and waits behind
    made.step()
    assert made.stats.rows == 1 and made.stats.waiting == 2
    while made.stats.rows or made.stats.waiting or not order:
        made.step()
    assert order == ["first", "small", "big"] and made.columns == 60
    with pytest.raises(fw.ConfigError, match="2 answers of up to 35 tokens are more than the 60"):
        ask("never", 20, 15, n=2)


def test_what_does_not_fit_is_refused_at_once():
    with engine(rows=4, queue=2, length=32) as made:

        def ask(ids, task=None, **options):
            return made.submit(ids, Sampling(**{"max_tokens": 4, **options}), task, Kept())

        for ids, options, message in (
            ([], {}, "no token"),
            ([3, 128], {}, "outside the vocabulary; expected 0 to 127"),
            ([3, -1], {}, "outside the vocabulary"),
            ([3], {"logit_bias": {500: 1.0}}, "outside the vocabulary"),
            (prompt(20), {"max_tokens": 13}, "more than the 32 that fit"),
            ([3], {"n": 5}, "at most 4 answers"),
        ):
            with pytest.raises(fw.ConfigError, match=message):
                ask(ids, **options)
        with pytest.raises(fw.ConfigError, match="no task is named 'midle'; did you mean middle"):
            ask([3], "midle")
    for options, message in (
        ({"max_tokens": 0}, "max_tokens=0; expected 1 or more"), ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"), ({"n": 0}, "n=0"), ({"stop": ("",)}, "stop"), ({"logprobs": 21}, "0 to 20"),
        ({"strength": -1.0}, "strength"), ({"strength": float("nan")}, "strength"),
        ({"presence_penalty": float("nan")}, "presence"), ({"logit_bias": {1: float("inf")}}, "logit_bias"),
    ):  # fmt: skip
        with pytest.raises(fw.ConfigError, match=message):
            Sampling(**options)


def test_a_full_queue_says_when_to_come_again():
    made = Engine(engines.library(), zoo.tokenizer(), Limits(rows=1, queue=2))
    sinks = [Kept() for _ in range(3)]
    for sink in sinks[:2]:
        made.submit(prompt(4), greedy(3), None, sink)
    with pytest.raises(OverloadedError, match="2 requests are waiting") as refused:
        made.submit(prompt(4), greedy(3), None, sinks[2])
    assert 1 <= refused.value.retry_after <= 60
    made.step()
    made.submit(prompt(4), greedy(3), None, sinks[2])
    while not all(s.ended.is_set() for s in sinks):
        made.step()


def test_more_prompts_than_the_queue_holds():
    held = engines.library()
    asked = [(prompt(3 + i % 4, i), t) for i, t in enumerate([None, "short", "middle", "long"] * 3)]
    with engine(held, rows=2, queue=2) as made:
        got = made.generate([p for p, _ in asked], greedy(5), [t for _, t in asked])
        assert [w[0].tokens for w in got] == [alone(held, p, t, 5) for p, t in asked]
        with pytest.raises(fw.ConfigError, match="2 tasks for 3 prompts"):
            made.generate([prompt(3)] * 3, greedy(2), ["short", None])
    other = Engine(held, zoo.tokenizer(), Limits(rows=1, queue=1))  # full of others' requests, and nobody works on them
    other.submit(prompt(4), greedy(3), None, Kept())
    with pytest.raises(OverloadedError):
        other.generate([prompt(4)], greedy(2))


@pytest.mark.parametrize("mixed", [["weighed", "short", None, "weighed", "long"], ["weighed"] * 3])
def test_tokens_that_stand_for_several(mixed):
    """Merged tokens carry weights of their own, also where each row gets a copy of its task."""
    held = engines.library()
    long = held["long"]
    weights = {n: 0.5 * torch.arange(k.shape[1]).float() for n, k in long.keys.items()}
    held.add("weighed", replace(long, log_weights=weights))
    assert alone(held, prompt(5), "weighed", 8) != alone(held, prompt(5), "long", 8)
    want = [alone(held, prompt(5, i), t, 8) for i, t in enumerate(mixed)]
    with engine(held) as running:
        got = running.generate([prompt(5, i) for i in range(len(mixed))], greedy(), mixed)
    assert [w[0].tokens for w in got] == want
