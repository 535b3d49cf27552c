"""Memory of an engine's requests: promised before a request begins, given back when it has ended.

What its rows may come to hold is known before: all of them are as wide as the widest will be at its last token, and
have room to grow. Rows that are split into lanes hold less than that, never more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from foreword.errors import BudgetError
from foreword.serve.budget import QUEUE
from foreword.serve.cache import capacity_for
from foreword.serve.request import Request
from foreword.serve.tiers.holdings import Promise

if TYPE_CHECKING:
    from foreword.serve._work import Work
    from foreword.serve.tiers.holdings import Holdings


class Bookings:
    """Of one engine. All but :meth:`expect` belongs to its thread, and both of what is queued to the queue's lock.

    Args:
        column_bytes: of a token's keys and values.
    """

    def __init__(self, holdings: Holdings, column_bytes: int) -> None:
        self.holdings, self.column_bytes = holdings, column_bytes
        self.limited = holdings.budget.device_bytes is not None
        self._promise = Promise()
        self._expected: set[Request] = set()
        self._begun: set[Request] = set()

    # ---------------------------------------------------------------- how much

    def rows_bytes(self, requests: Iterable[Request]) -> int:
        """Of requests at work together, while they are written."""
        requests = list(requests)
        rows = sum(r.sampling.n for r in requests)
        widest = max((len(r.prompt) + r.sampling.max_tokens for r in requests), default=0)
        if not rows:
            return 0
        return rows * (capacity_for(widest) * self.column_bytes + self._copy(requests))

    def prompts_bytes(self, requests: Sequence[Request]) -> int:
        """Of prompts that are read together, besides."""
        longest = max((len(r.prompt) for r in requests), default=0)
        return len(requests) * (longest * self.column_bytes + self._copy(requests))

    def whole_bytes(self, request: Request) -> int:
        """Of a request that is alone: its prefix, its prompt, its rows to their last token."""
        prefix = request.task.whole if request.task is not None else 0
        return prefix + self.rows_bytes([request]) + self.prompts_bytes([request])

    @staticmethod
    def _copy(requests: Sequence[Request]) -> int:
        """Of what a row reads, if it is a copy: where rows of several tasks, or strengths, are mixed."""
        different = {(r.task, r.sampling.strength) for r in requests}
        if len(different) == 1 and next(iter(different))[1] == 1:
            return 0
        return max((r.task.reader for r in requests if r.task is not None), default=0)

    # ---------------------------------------------------------------- a request's life

    def expect(self, request: Request) -> None:
        """It was queued; the version of its task stays until it has ended.

        Raises:
            BudgetError: it can never begin.
        """
        limit = self.holdings.budget.device_bytes
        if limit is not None and (need := self.whole_bytes(request)) > limit:
            raise BudgetError(
                f"this request needs {need:,} bytes on the device for its prefix, prompt and answers, and the budget "
                f"has {limit:,}; shorten it, ask for fewer answers, or raise device_bytes", needed=need, limit=limit,
            )  # fmt: skip
        self._expected.add(request)

    def begin(self, group: Sequence[Request], work: Work) -> None:
        """Have room and prefixes for requests beside those at work.

        Raises:
            BudgetError: there is no room; nothing has changed.
        """
        need = self._needed([*work.requests, *group], group, work) if self.limited else 0
        tasks = [r.task for r in group if r.task is not None]
        level = min((r.task.priority if r.task is not None else 0 for r in group), default=0)
        self.holdings.acquire(tasks, self._promise, need, level)
        for request in group:
            request.prefix = request.task.ready if request.task is not None else None
            self._begun.add(request)

    def unqueued(self, request: Request) -> None:
        """It has left the queue and begun: it uses its task now, and doesn't wait for it."""
        self._expected.discard(request)
        if request.task is not None:
            self.holdings.forget(request.task)

    def unqueue(self, waiting: Iterable[Request]) -> None:
        """Those that have left the queue, and didn't begin, are expected no longer."""
        gone = self._expected.difference(waiting)
        self._expected -= gone
        for request in gone:
            if request.task is not None:
                self.holdings.forget(request.task)

    def settle(self, work: Work) -> None:
        """Give back what was kept for requests that have ended."""
        present = set(work.requests)
        ended = [r for r in self._begun if r not in present]
        self._begun.difference_update(ended)
        if self.limited and self._promise.nbytes:
            need = self._needed(work.requests, work.prompts, work)
            if need < self._promise.nbytes:
                self.holdings.change(self._promise, need)
        self.holdings.release([r.task for r in ended if r.task is not None])
        for request in ended:
            request.prefix = None  # whoever keeps the request doesn't keep the copy

    def _needed(self, requests: Sequence[Request], prompts: Sequence[Request], work: Work) -> int:
        """For these, and what is allocated; what is allocated for those that left is given back if that is more."""
        rows = self.rows_bytes(requests)
        if work.lanes.nbytes > rows:
            work.lanes.tighten()
        return max(rows, work.lanes.nbytes) + self.prompts_bytes(prompts)

    def refusal(self, error: BudgetError, waits: bool, seconds: int) -> BudgetError | None:
        """What a request is told that finds no room; None: it waits.

        Args:
            waits: others will have ended, and leave room.
            seconds: until then, about.
        """
        if not waits and not self.holdings.in_use():
            return error
        if QUEUE in self.holdings.budget.actions:
            return None
        error.retry_after = seconds
        return error
