"""What happens to an engine: rows that fail, requests that are late, tasks that change, many threads, its end."""

from __future__ import annotations

import queue
import threading
import time

import engines
import pytest
import torch
from engines import Kept, alone, engine, greedy, prompt

import foreword as fw
import zoo
from foreword.errors import DeadlineError, StoppedError
from foreword.serve.admission import Limits
from foreword.serve.engine import Engine

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
        monkeypatch.setattr(made._work, "_count", lambda: (_ for _ in ()).throw(ZeroDivisionError("a bug")))
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


def test_a_crowd_of_jobs_does_not_keep_the_rows_waiting():
    """The library's changes wait for one another, and rows go on between them."""
    made, kept = Engine(engines.library(), zoo.tokenizer()), Kept()
    made.submit(prompt(5), greedy(10), "long", kept)
    made.step()
    jobs = [made.between_steps(lambda: time.sleep(0.05)) for _ in range(3)]
    for done in (1, 2, 3):
        before = len(kept.told)
        made.step()
        assert [job.done() for job in jobs] == [n < done for n in range(3)] and len(kept.told) > before
    many = [made.between_steps(lambda: None) for _ in range(10)]
    while not many[-1].done():
        made.step()
    assert all(job.done() for job in many)


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


def test_nobody_waits_for_an_engine_that_has_ended():
    held = engines.library()
    with engine(held) as made:
        assert made.close(wait=60)
        with pytest.raises(StoppedError):
            made.between_steps(lambda: None)
    never = Engine(held, zoo.tokenizer())  # never started
    kept, job, dropped = Kept(), never.between_steps(lambda: None), never.between_steps(lambda: None)
    never.submit(prompt(4), greedy(3), None, kept)
    dropped.cancel()
    assert not never.close()
    never.stop()
    assert isinstance(kept.error, StoppedError) and isinstance(job.exception(1), StoppedError) and dropped.cancelled()
    with pytest.raises(StoppedError):
        never.submit(prompt(4), greedy(3), None, Kept())


def test_whoever_has_its_whole_answer_is_not_told_of_a_later_failure(monkeypatch):
    made = Engine(engines.library(), zoo.tokenizer(), Limits(rows=2))
    kept = Kept()
    request = made.submit(prompt(4), greedy(2), None, kept)
    monkeypatch.setattr(made._work.lanes, "clear", lambda: (_ for _ in ()).throw(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        made.step()
    assert kept.finish == ["length"] and request in made._all_requests()  # its row is still there
    made._work.fail(ZeroDivisionError("a bug"), made._all_requests())
    assert not request.cancelled and made.stats.failed == 0
