"""The engine: an answer is what its request gets alone, whatever else runs, comes, goes or fails."""

from __future__ import annotations

import queue
import threading
import time
from functools import cache

import engines
import pytest
import torch
from engines import alone, engine, greedy, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.errors import DeadlineError, OverloadedError, StoppedError
from foreword.serve.admission import Limits
from foreword.serve.engine import Engine
from foreword.serve.library import Library
from foreword.serve.request import Piece, Sampling

DECODERS = [n for n in zoo.DECODERS if n != "qwen3next"]


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self, n=1):
        self.told, self.tokens, self.text, self.finish = [], [[] for _ in range(n)], [""] * n, [None] * n
        self.error, self.ended = None, threading.Event()

    def __call__(self, what):
        assert not self.ended.is_set(), "told after the end"
        self.told.append(what)
        if isinstance(what, Exception):
            self.error = what
        else:
            assert isinstance(what, Piece) and self.finish[what.index] is None
            self.tokens[what.index] += what.tokens
            self.text[what.index] += what.text
            self.finish[what.index] = what.finish
        if self.error or all(self.finish):
            self.ended.set()


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
        for lane in made._lanes:
            assert lane.padding <= made._lanes.most_padding or len({a.request for a in lane.answers}) == 1
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
    most = made._lanes.most_padding
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


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("when", ["prompt", "answer"])
def test_a_row_that_fails_leaves_alone(when):
    held = engines.library()
    asked = [(prompt(6, i), t) for i, t in enumerate([None, "short", "middle", "long", "short"])]
    want = [alone(held, p, t, 8) for p, t in asked]
    # A token that one request has and no other does, in its prompt or (but for the last, which isn't read) its answer.
    found = [
        (i, t) for i, (ids, _) in enumerate(asked) for t in (ids if when == "prompt" else want[i][:-1])
        if all(t not in [*o, *w] for j, ((o, _), w) in enumerate(zip(asked, want, strict=True)) if j != i)
    ]  # fmt: skip
    bad, poison = found[0]

    def fail(module, args):
        if bool((args[0] == poison).any()):
            raise RuntimeError("poisoned")

    made = Engine(held, zoo.tokenizer(), Limits(rows=8))
    held.model.get_input_embeddings().register_forward_pre_hook(fail)
    kept = [Kept() for _ in asked]
    for (ids, task), sink in zip(asked, kept, strict=True):
        made.submit(ids, greedy(8), task, sink)
    for _ in range(40):
        made.step()
    assert all(k.ended.is_set() for k in kept)
    assert str(kept[bad].error) == "poisoned"
    assert [k.tokens[0] for i, k in enumerate(kept) if i != bad] == [w for i, w in enumerate(want) if i != bad]
    assert made.stats.failed == 1 and made.stats.rows == 0


def test_numbers_that_are_not_finite_end_their_request_only():
    held = engines.library()
    site = next(iter(held["long"].keys))
    broken = fw.Prefix(
        {**held["long"].keys, site: held["long"].keys[site] * float("nan")}, held["long"].values, held["long"].sites
    )
    held.add("broken", broken, force=True)
    want = alone(held, prompt(5), "short", 6)
    with engine(held) as made:
        kept = [Kept(), Kept(), Kept()]
        for task, sink in zip(["short", "broken", "short"], kept, strict=True):
            made.submit(prompt(5), greedy(6), task, sink)
        for sink in kept:
            assert sink.ended.wait(60)
        assert "not finite" in str(kept[1].error) and kept[0].tokens == kept[2].tokens == [want]
        # Rows that come to where the broken one was aren't hurt by what it left.
        again = made.generate([prompt(9), prompt(3)], greedy(6), ["short", None])
    assert [w[0].tokens for w in again] == [alone(held, prompt(9), "short", 6), alone(held, prompt(3), None, 6)]


def test_no_memory_for_a_row_fails_its_lane_and_the_engine_goes_on(monkeypatch):
    from foreword.serve.cache import RowCache

    held = engines.library()
    with engine(held) as made:
        join = RowCache.join
        monkeypatch.setattr(RowCache, "join", lambda *a: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            made.generate([prompt(5)], greedy(4), "short")
        monkeypatch.setattr(RowCache, "join", join)
        assert made.generate([prompt(5)], greedy(4), "short")[0][0].tokens == alone(held, prompt(5), "short", 4)


def test_an_error_of_the_engines_own_fails_what_runs_and_the_engine_goes_on(monkeypatch):
    held = engines.library()
    with engine(held) as made:
        monkeypatch.setattr(made, "_clear", lambda: (_ for _ in ()).throw(ZeroDivisionError("a bug")))
        with pytest.raises(ZeroDivisionError):
            made.generate([prompt(5)], greedy(4), "short")
        monkeypatch.undo()
        assert made.generate([prompt(5)], greedy(4), "short")[0][0].tokens == alone(held, prompt(5), "short", 4)


def test_a_sink_that_fails_frees_its_row():
    held = engines.library()
    made = Engine(held, zoo.tokenizer())

    def closed(piece):
        raise RuntimeError("the loop is closed")

    other = Kept()
    made.submit(prompt(5), greedy(50), "short", closed)
    made.submit(prompt(5), greedy(5), "long", other)
    for _ in range(8):
        made.step()
    assert other.tokens == [alone(held, prompt(5), "long", 5)] and made.stats.rows == 0


def test_requests_that_are_late_end():
    made = Engine(engines.library(), zoo.tokenizer(), Limits(rows=1))
    running, waiting = Kept(), Kept()
    made.submit(prompt(5), greedy(100), None, running, seconds=0.2)
    made.submit(prompt(5), greedy(100), None, waiting, seconds=0.2)
    made.step()
    time.sleep(0.25)
    made.step()
    for sink in (running, waiting):
        assert isinstance(sink.error, DeadlineError) and "no answer within" in str(sink.error)
    assert len(running.told) == 3 and len(waiting.told) == 1 and made.stats.rows == made.stats.waiting == 0


# ---------------------------------------------------------------- tasks, threads, ends


def test_a_task_that_is_replaced_stays_what_it_was_for_those_who_came_before():
    held = engines.library()
    old, new = held["long"], held["middle"]
    want = [alone(held, prompt(5), "long", 10), alone(held, prompt(5), "middle", 10)]
    assert want[0] != want[1]
    made = Engine(held, zoo.tokenizer())
    before, after = Kept(), Kept()
    made.submit(prompt(5), greedy(10), "long", before)
    made.step()
    done = made.between_steps(lambda: held.add("long", new))
    assert held["long"].longest == old.longest  # not yet
    made.step()
    assert done.done() and held["long"].longest == new.longest
    made.submit(prompt(5), greedy(10), "long", after)
    for _ in range(12):
        made.step()
    assert before.tokens == want[:1] and after.tokens == want[1:]


def test_a_task_that_comes_while_the_engine_runs_may_have_a_rule_of_its_own():
    """An infix puts hooks on the model: they must not come in the middle of a pass."""
    held = engines.library()
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix:1"))
    infix = tuning.bake()
    ids = torch.tensor([prompt(6)])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, 6:].tolist()
    with engine(held) as made:
        first = Kept()
        made.submit(prompt(7), greedy(60), "long", first)
        made.between_steps(lambda: held.add("infix", infix)).result(60)
        got = made.generate([prompt(6), prompt(9), prompt(6)], greedy(8), ["infix", "long", "infix"])
        assert first.ended.wait(60)
    assert got[0][0].tokens == got[2][0].tokens == want
    assert got[1][0].tokens == alone(held, prompt(9), "long", 8)
    assert first.tokens == [alone(held, prompt(7), "long", 60)]


def test_memories_that_cannot_be_mixed_are_written_apart():
    held = engines.library()
    made = {}
    for name, activation in (("elu", "elu"), ("gelu", "gelu")):
        model = zoo.build("llama")
        tuning = fw.attach(model, fw.MemoryConfig(activation=activation))
        with torch.no_grad():
            for p in tuning.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
        made[name] = tuning.bake()
        held.add(name, made[name])
    tasks = ["elu", "gelu", "long", "elu", None]
    want = [alone(held, prompt(5, i), t, 6) for i, t in enumerate(tasks)]
    with engine(held) as running:
        got = running.generate([prompt(5, i) for i in range(5)], greedy(6), tasks)
    assert [w[0].tokens for w in got] == want


def test_many_threads_at_once():
    held = engines.library()
    tasks = [None, "short", "middle", "long"]
    want = {(i, t): alone(held, prompt(3 + i, i), t, 6) for i in range(4) for t in tasks}
    failures = queue.Queue()
    with engine(held, rows=6) as running:

        def work(number):
            for k in range(6):
                i, task = (number + k) % 4, tasks[(number * 3 + k) % 4]
                got = running.generate([prompt(3 + i, i)], greedy(6), task)[0][0].tokens
                if got != want[i, task]:
                    failures.put((i, task, got))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    assert failures.empty(), failures.get()


def test_closing_lets_requests_finish_and_stopping_does_not():
    held = engines.library()
    with engine(held) as made:
        finishes = Kept()
        made.submit(prompt(5), greedy(30), "short", finishes)
        assert made.close(wait=60)
        assert finishes.tokens == [alone(held, prompt(5), "short", 30)] and not made.accepting
        with pytest.raises(StoppedError):
            made.submit(prompt(5), greedy(3), None, Kept())
        with pytest.raises(StoppedError):
            made.between_steps(lambda: None)
    with engine(held, rows=1) as made:
        running, waiting = Kept(), Kept()
        made.submit(prompt(5), greedy(120), None, running)
        made.submit(prompt(5), greedy(120), None, waiting)
        made.stop()
        assert isinstance(running.error, StoppedError) and isinstance(waiting.error, StoppedError)
    idle = Engine(held, zoo.tokenizer())  # never started
    assert idle.close()
    idle.stop()


def test_the_library_can_be_used_beside_the_engine():
    held = engines.library()
    want = [alone(held, prompt(5), t, 12) for t in ("long", "short")]
    with engine(held) as made:
        kept = Kept()
        made.submit(prompt(5), greedy(12), "long", kept)
        assert alone(held, prompt(5), "short", 12) == want[1]
        assert kept.ended.wait(60) and kept.tokens == want[:1]
