"""Budget: any sequence of what can happen, against what must hold whatever happens."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_tasks import TOKEN, make

import foreword as fw
import zoo
from foreword.serve.library import Library


class Life(RuleBasedStateMachine):
    """Tasks come and go, are used, pinned, replaced: against what must hold whatever happens."""

    def __init__(self):
        super().__init__()
        self.expected, self.open, self.pinned, self.changes = {}, [], set(), 0

    @initialize(
        tokens=st.integers(6, 30), cpu=st.integers(0, 20),
        acts=st.sets(st.sampled_from(["compress", "move"])).flatmap(lambda s: st.permutations(sorted(s))),
    )  # fmt: skip
    def begin(self, tokens, cpu, acts):
        self.lossless = "compress" not in acts
        self.limits = tokens * TOKEN, cpu * TOKEN
        self.held = Library(zoo.build("llama"), budget=fw.Budget(*self.limits, [*acts, "refuse"]))

    def names(self):
        return sorted(self.expected)

    @rule(name=st.sampled_from("abcdefgh"), length=st.integers(1, 12), priority=st.integers(-1, 1), pin=st.booleans())
    def add(self, name, length, priority, pin):
        self.changes += 1
        before, prefix = self.held.usage, make(length, self.changes)
        pin = pin and len(self.pinned) < 2
        try:
            self.held.add(name, prefix, priority=priority, pinned=pin)
        except fw.BudgetError as exc:
            assert exc.limit == self.limits[0] and exc.needed > exc.free
            after = self.held.usage
            assert after.tasks == before.tasks, "a refusal changed something"
            return
        self.expected[name] = prefix
        (self.pinned.add if pin else self.pinned.discard)(name)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def remove(self, data):
        name = data.draw(st.sampled_from(self.names()))
        self.held.remove(name)
        del self.expected[name]
        self.pinned.discard(name)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), on=st.booleans())
    def pin(self, data, on):
        name = data.draw(st.sampled_from(self.names()))
        try:
            self.held.pin(name) if on else self.held.unpin(name)
        except fw.BudgetError:
            return
        (self.pinned.add if on else self.pinned.discard)(name)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def enter(self, data):
        name = data.draw(st.sampled_from(self.names()))
        ranks = {n: u.priority for n, u in self.held.usage.tasks.items()}
        before = {n for n, u in self.held.usage.tasks.items() if u.device_bytes}
        block = self.held.use(name)
        try:
            block.__enter__()
        except fw.BudgetError:
            return
        gone = before - {n for n, u in self.held.usage.tasks.items() if u.device_bytes}
        assert all(ranks[n] <= ranks[name] for n in gone), "a task of higher rank made room"
        self.open.append((block, self.expected[name], self.held._choice.get().prefixes[0]))

    @precondition(lambda self: self.open)
    @rule()
    def leave(self):
        block, prefix, read = self.open.pop()
        self.same(prefix, read)
        block.__exit__(None, None, None)

    def same(self, prefix, read):
        if self.lossless:
            assert read == prefix
        else:
            for name, keys in prefix.keys.items():
                torch.testing.assert_close(read.keys[name], keys, atol=0.05, rtol=0.05)

    @invariant()
    def budgets_hold(self):
        if not hasattr(self, "held"):
            return
        usage, holdings = self.held.usage, self.held.holdings
        assert usage.tiers["device"].most <= self.limits[0] and usage.tiers["cpu"].most <= self.limits[1]
        everyone = list(holdings._everyone())
        assert usage.tiers["device"].nbytes == sum(h.device_bytes for h in everyone)
        assert usage.tiers["cpu"].nbytes == sum(h.form.nbytes for h in everyone if h.tier == "cpu")
        assert usage.tiers["file"].nbytes == sum(h.form.nbytes for h in everyone if h.tier == "file")
        assert all(h.size == h.form.nbytes and h.tier for h in everyone)
        assert all(h.ready is None or h.ready.nbytes == h.whole for h in everyone)

    @invariant()
    def none_is_lost(self):
        if not hasattr(self, "held"):
            return
        assert set(self.held.names) == set(self.expected)
        for name, prefix in self.expected.items():
            self.same(prefix, self.held[name])

    @invariant()
    def pinned_ones_are_there(self):
        if hasattr(self, "held"):
            assert all(self.held.holdings.find(n).ready is not None for n in self.pinned)

    def teardown(self):
        while self.open:
            self.leave()
        if hasattr(self, "held"):
            for name in self.held.names:
                self.held.remove(name)
            assert self.held.usage.tiers["device"].nbytes == self.held.usage.tiers["cpu"].nbytes == 0
            assert self.held.usage.tiers["file"].nbytes == 0
            self.held.detach()


Life.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLife = Life.TestCase
