"""An engine within a budget: promised before it is begun, never overdrawn, and every answer is what it is alone."""

from __future__ import annotations

import time

import engines
import pytest
from engines import Kept, alone, greedy, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.serve.admission import Limits
from foreword.serve.cache import capacity_for
from foreword.serve.engine import Engine
from foreword.serve.library import Library

DECODERS = [n for n in zoo.DECODERS if n != "qwen3next"]


def build(device_bytes, when_full="move,queue,refuse", *, name="llama", cpu_bytes=0, rows=4, add=True, **limits):
    held = Library(zoo.build(name), budget=fw.Budget(device_bytes, cpu_bytes, when_full))
    for task, prefix in engines.prefixes(zoo.build(name)).items() if add else ():
        held.add(task, prefix)
    return held, Engine(held, zoo.tokenizer(), Limits(**{"rows": rows, "step_tokens": 32, **limits}))


def room_for(tokens):
    """Bytes of so many tokens."""
    return tokens * sum(s.parameters(1) for s in fw.sites(zoo.build("llama"))) * 4


def on_the_device(engine):
    """Bytes that are there: prefixes, caches of rows and prompts, and what rows of several tasks read."""
    held, work = engine.library.holdings, engine._work
    lanes = list(work.lanes)
    prompts = [
        t for reading in work._readings for layer in reading.cache.layers if layer.is_initialized
        for t in (layer.keys, layer.values)
    ]  # fmt: skip
    choices = [c for lane in lanes for c in lane._choices.values()] + [
        reading._batch[2] for reading in work._readings if reading._batch is not None
    ]
    own = {t.untyped_storage().data_ptr() for h in held._everyone() if h.ready for t in h.ready.keys.values()}
    own |= {t.untyped_storage().data_ptr() for h in held._everyone() if h.ready for t in h.ready.values.values()}
    copies = {}
    for choice in choices:
        for view in filter(None, choice.views.values()):
            for t in (view.keys, view.values, view.visible, view.bias, view.gate, view.reading):
                if t is not None and t.untyped_storage().data_ptr() not in own:
                    copies[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    prefixes = sum(h.device_bytes for h in held._everyone())
    caches = sum(lane.cache.nbytes for lane in lanes) + sum(t.nbytes for t in prompts)
    return prefixes + caches + sum(copies.values())


@pytest.mark.parametrize("name", DECODERS)
def test_a_token_takes_the_bytes_that_it_is_counted_as(name):
    held = engines.library(name)
    engine = Engine(held, zoo.tokenizer(), Limits(rows=4))
    for number in range(3):
        engine.submit(prompt(5 + number, number), greedy(4), None, Kept())
    engine.step()
    engine.step()
    (lane,) = engine._work.lanes
    assert lane.cache.nbytes == lane.cache.places * lane.cache.capacity * engine.column_bytes


_requests = st.lists(
    st.tuples(
        st.integers(0, 10),  # the step that it comes at
        st.integers(1, 20),  # tokens of the prompt
        st.integers(1, 70),  # tokens of the answer
        st.sampled_from([None, "short", "middle", "long"]),
        st.integers(1, 2),  # n
        st.none() | st.integers(0, 6),  # steps until it is cancelled
    ),
    min_size=1,
    max_size=8,
)
_alone = {}


@settings(max_examples=25, deadline=None)
@given(
    requests=_requests, tokens=st.integers(20, 900), cpu=st.sampled_from([0, None]), remove=st.integers(0, 30),
    when=st.sampled_from(["move,queue", "move,refuse"]),
)  # fmt: skip
def test_whatever_comes_nothing_is_overdrawn_and_no_answer_is_another(requests, tokens, cpu, remove, when):
    limit = room_for(tokens)
    held, engine = build(limit, when, cpu_bytes=cpu)
    sinks, waiting, cancel = [], sorted(enumerate(requests), key=lambda r: r[1][0]), []
    for step in range(2000):
        while waiting and waiting[0][1][0] <= step:
            number, (_, length, answer, task, n, end) = waiting.pop(0)
            sink = Kept(n)
            try:
                made = engine.submit(prompt(length, number), greedy(answer, n=n, ignore_eos=True), task, sink)
            except fw.BudgetError as exc:
                assert exc.needed > limit == exc.limit
                continue
            except fw.ConfigError as exc:
                assert step > remove and "no task is named 'middle'" in str(exc)
                continue
            sinks.append((number, sink, end))
            if end is not None:
                cancel.append((step + end, made))
        for at, made in cancel:
            if at == step:
                engine.cancel(made)
        if step == remove:
            held.remove("middle")
        engine.step()
        assert on_the_device(engine) <= held.usage.tiers["device"].nbytes <= limit
        if not waiting and not engine._work and not engine._queue:
            break
    assert step < 1999
    engine.step()
    usage = held.usage
    assert usage.caches == 0 and usage.leaving == 0 and all(t.users == 0 for t in usage.tasks.values())
    assert usage.tiers["device"].most <= limit
    for number, sink, end in sinks:
        _, length, answer, task, n, _ = requests[number]
        if sink.error is not None:
            assert isinstance(sink.error, fw.BudgetError) and when == "move,refuse", sink.error
        elif end is None:
            key = (number, length, answer, task)
            if key not in _alone:
                _alone[key] = alone(_plain(), prompt(length, number), task, answer, eos_token_id=None)
            assert sink.tokens == [_alone[key]] * n
    engine.stop()
    held.detach()


_library = []


def _plain():
    if not _library:
        _library.append(engines.library())
    return _library[0]


def test_what_can_never_fit_is_refused_at_once_with_the_numbers():
    held, engine = build(room_for(160))
    need = engine.bytes_of(prompt(10), greedy(80), "long")
    assert need == room_for(6 + capacity_for(90) + 10)
    with pytest.raises(fw.BudgetError, match=rf"needs {need:,} bytes .* the budget has {room_for(160):,}"):
        engine.submit(prompt(10), greedy(80), "long", Kept())
    assert all(h.waiting == 0 for h in held.holdings._everyone())
    engine.stop()


def test_who_finds_no_room_waits_or_is_told_when_to_come_again():
    for when, waits in (("move,queue", True), ("move", False)):
        _, engine = build(room_for(160), when)
        first, second = Kept(), Kept()
        engine.submit(prompt(5), greedy(20), "long", first)
        engine.step()
        engine.submit(prompt(5), greedy(20), "long", second)
        engine.step()
        if waits:
            assert second.error is None and not second.told and first.tokens[0]
        else:
            assert isinstance(second.error, fw.BudgetError) and second.error.retry_after >= 1
        engine.start()
        assert first.ended.wait(60) and second.ended.wait(60)
        assert first.finish == ["length"] and (second.tokens == first.tokens) == waits
        engine.stop()


def test_nobody_waits_for_room_that_never_comes():
    held, engine = build(room_for(170), add=False)
    made = engines.prefixes(zoo.build("llama"), {"wide": 90, "low": 2})
    held.add("wide", made["wide"], priority=1)
    held.add("low", made["low"])
    low, base, wide = Kept(), Kept(), Kept()
    for task, length, sink in (("low", 30, low), (None, 30, base), ("wide", 5, wide)):
        engine.submit(prompt(length), greedy(5), task, sink)
    for _ in range(20):
        engine.step()
    assert all(isinstance(s.error, fw.BudgetError) and s.error.retry_after is None for s in (low, base))
    assert "above priority 0" in str(low.error) and wide.finish == ["length"]
    engine.stop()


def test_a_block_of_somebody_else_is_waited_for():
    held, engine = build(room_for(170), add=False)
    made = engines.prefixes(zoo.build("llama"), {"wide": 90, "low": 2})
    for name, prefix in made.items():
        held.add(name, prefix)
    sink = Kept()
    with held.use("wide"):
        engine.start()
        engine.submit(prompt(5), greedy(5), "low", sink)
        time.sleep(0.3)
        assert not sink.told and engine.stats.steps < 60  # it looks now and then, and doesn't spin
    assert sink.ended.wait(30) and sink.finish == ["length"]
    assert held.usage.tasks["wide"].tier == "file"
    engine.stop()


def test_a_task_replaced_while_its_request_waits_is_what_it_was():
    held, engine = build(room_for(160))
    first, second = Kept(), Kept()
    want = alone(_plain(), prompt(6, 3), "long", 8)
    engine.submit(prompt(5), greedy(20), "short", first)
    engine.step()
    engine.submit(prompt(6, 3), greedy(8), "long", second)
    held.add("long", engines.prefixes(zoo.build("llama"))["short"])
    assert held.usage.leaving == 1
    engine.start()
    assert second.ended.wait(60) and second.tokens == [want]
    engine.stop()
    assert held.usage.leaving == 0 and held.usage.tiers["device"].nbytes <= room_for(160)


def test_a_memory_is_counted_too():
    model = zoo.build("llama")
    tuning = fw.attach(model, [fw.PrefixConfig(length=4, init="random"), fw.MemoryConfig()])
    prefix = tuning.bake()
    tuning.detach()
    held = Library(model, budget=fw.Budget(room_for(2000)))
    held.add("memory", prefix)
    held.add("short", engines.prefixes(zoo.build("llama"))["short"])
    assert held.bytes_of(prefix) == prefix.nbytes == held.usage.tasks["memory"].nbytes
    engine = Engine(held, zoo.tokenizer(), Limits(rows=4))
    sinks = [Kept(), Kept(), Kept()]
    for task, sink in zip(("memory", "short", None), sinks, strict=True):
        engine.submit(prompt(5), greedy(6, strength=1.5), task, sink)
    for _ in range(12):
        engine.step()
        lanes = list(engine._work.lanes)
        memories = sum(
            v.memory.matrix.nbytes + (v.memory.up.nbytes if v.memory.up is not None else 0)
            for lane in lanes for c in lane._choices.values() for v in c.views.values() if v and v.memory
        )  # fmt: skip
        assert on_the_device(engine) + memories <= held.usage.tiers["device"].nbytes
    assert all(s.finish == ["length"] for s in sinks)
    engine.stop()
