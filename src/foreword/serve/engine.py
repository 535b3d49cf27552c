"""The engine: requests of many tasks on one model, whose rows join and leave the batch between its steps.

One thread runs the model. A step reads a part of the prompts that have come, and writes a token to every row. Callers
are in other threads: they :meth:`~Engine.submit` requests, and each request's sink is given its pieces as they come.

An answer depends on its own request only: rows are independent in the model, each draws its own random numbers, and a
row that fails leaves alone. (Scores are equal up to rounding, which differs with the number of rows.)
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from foreword.errors import BudgetError, ConfigError, DeadlineError, OverloadedError, StoppedError
from foreword.serve._bookings import Bookings
from foreword.serve._calls import Calls
from foreword.serve._text import Text
from foreword.serve._work import Stats, Work
from foreword.serve._workers import let_workers_go
from foreword.serve.admission import Limits, next_group
from foreword.serve.library import Library
from foreword.serve.request import Answer, Request, Sampling, Sink
from foreword.serve.tiers.held import Held
from foreword.serve.written import Written, collector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_PATIENCE = 0.05  # seconds between looks for memory that nobody tells of
_JOBS = 0.02  # seconds for jobs before a step; the others wait for the next one, so that a crowd of them stops no row
T = TypeVar("T")


class Engine:
    """Writes answers for a library's tasks.

    Args:
        library: the tasks, and the model.
        tokenizer: the model's.

    Raises:
        UnsupportedModelError: the model's rows can't be written together.
    """

    def __init__(self, library: Library, tokenizer: PreTrainedTokenizerBase, limits: Limits | None = None) -> None:
        self.library, self.tokenizer, self.limits = library, tokenizer, limits or Limits()
        self.stats = Stats()
        calls = Calls(library)
        calls.prove()
        config = library.model.config.get_text_config(decoder=True)
        own = getattr(config, "max_position_embeddings", None) or 4096
        self.length = min(self.limits.length or own, own)
        self.columns = self.limits.columns or self.limits.rows * self.length
        self.ends = frozenset(_as_list(library.model.generation_config.eos_token_id))
        self.column_bytes = calls.column_bytes  # of keys and values, a token
        self._bookings = Bookings(library.holdings, self.column_bytes)
        library.holdings.released.append(self._notify)
        self._vocabulary = int(config.vocab_size)
        self._queue: deque[Request] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._work = Work(calls, self.limits.step_tokens, self.stats, exact=self._bookings.limited)
        self._wake = threading.Condition()
        self._short = False  # of memory: whoever is first waits for some
        self._closed = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="foreword-engine", daemon=True)

    # ---------------------------------------------------------------- for callers, in any thread

    def start(self) -> Engine:
        """Begin to work on what was submitted and what will be. Returns the engine."""
        let_workers_go()
        self._thread.start()
        return self

    @property
    def accepting(self) -> bool:
        """Whether requests are taken."""
        return not self._closed and not self._ended

    @property
    def _ended(self) -> bool:
        """Whether nothing is done any more."""
        return self._stopped or (self._thread.ident is not None and not self._thread.is_alive())

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, task: str | None, sink: Sink, *, seconds: float | None = None
    ) -> Request:
        """Queue a request.

        Its prefix is the task's as it is now: a task that is replaced or removed later doesn't change it.

        Args:
            sink: called in the engine's thread with each :class:`Piece`, or with the error that ends the request; must
                not wait.
            seconds: that it may take, the queue included.

        Raises:
            ConfigError: the task is unknown, or the prompt doesn't fit.
            OverloadedError: the queue is full.
            BudgetError: it needs more memory than the library's budget has.
            StoppedError: the engine takes no requests any more.
        """
        held = self.library.holdings.expect(task) if task is not None else None
        try:
            return self._submit(prompt, sampling, held, sink, seconds)
        except BaseException:
            if held is not None:
                self.library.holdings.forget(held)
            raise

    def _submit(
        self, prompt: Sequence[int], sampling: Sampling, held: Held | None, sink: Sink, seconds: float | None
    ) -> Request:
        deadline = None if seconds is None else time.monotonic() + seconds
        request = Request(prompt, sampling, None, sink, deadline=deadline, task=held)
        self._check(request)
        ends = frozenset(sampling.stop_tokens) | (frozenset() if sampling.ignore_eos else self.ends)
        request.answers = [Answer(request, i, Text(self.tokenizer, sampling.stop), ends) for i in range(sampling.n)]
        with self._wake:
            if not self.accepting:
                raise StoppedError("the engine takes no requests any more; start another one")
            if len(self._queue) >= self.limits.queue:
                after = math.ceil(self._work.seconds * (len(self._queue) + 1) / self.limits.rows)
                raise OverloadedError(
                    f"{len(self._queue)} requests are waiting, which is the most; try again later",
                    retry_after=min(60, max(1, after)),
                )
            self._bookings.expect(request)
            self._queue.append(request)
            self.stats.requests += 1
            self._wake.notify()
        return request

    def bytes_of(self, prompt: Sequence[int], sampling: Sampling, task: str | None = None) -> int:
        """Bytes that a request may come to take on the device if it is alone, its prefix among them."""
        held = self.library.holdings.find(task) if task is not None else None
        return self._bookings.whole_bytes(Request(prompt, sampling, None, lambda what: None, task=held))

    def cancel(self, request: Request) -> None:
        """End a request, wherever it is; nothing more is said about it."""
        with self._wake:
            if request.cancelled or request.done:
                return
            request.cancelled = True
            self.stats.cancelled += 1
            self._wake.notify()

    def between_steps(self, job: Callable[[], T]) -> Future[T]:
        """Run something in the engine's thread while no pass is under way: changes of the library belong here.

        Raises:
            StoppedError: the engine does nothing any more.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._ended:
                raise StoppedError("the engine is not running")
            self._jobs.append((job, future))
            self._wake.notify()
        return future

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling,
        tasks: Sequence[str | None] | str | None = None,
    ) -> list[list[Written]]:
        """Write answers to some prompts and wait for them: a list of ``n`` for each prompt.

        There may be more prompts than the queue holds.

        Args:
            prompts: texts or token ids.
            tasks: one a prompt, or one for all; None: the base model.

        Raises:
            ForewordError: a prompt or task is refused, or one failed; the others are cancelled then.
        """
        names = [tasks] * len(prompts) if tasks is None or isinstance(tasks, str) else list(tasks)
        if len(names) != len(prompts):
            raise ConfigError(f"{len(names)} tasks for {len(prompts)} prompts; name one a prompt, or one for all")
        found = [[Written() for _ in range(sampling.n)] for _ in prompts]
        waits: list[Future[None]] = []
        requests: list[Request] = []
        try:
            for prompt, task, answers in zip(prompts, names, found, strict=True):
                ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
                wait: Future[None] = Future()
                requests.append(self._submit_patiently(ids, sampling, task, collector(answers, wait), waits))
                waits.append(wait)
            for wait in waits:
                wait.result()
        finally:
            for request in requests:
                self.cancel(request)
        return found

    def _submit_patiently(
        self, ids: Sequence[int], sampling: Sampling, task: str | None, sink: Sink, before: Sequence[Future[None]]
    ) -> Request:
        """Submit, waiting for the caller's own earlier requests while the queue is full."""
        while True:
            try:
                return self.submit(ids, sampling, task, sink)
            except OverloadedError:
                running = next((wait for wait in before if not wait.done()), None)
                if running is None:  # it is full of others' requests
                    raise
                running.result()

    def close(self, *, wait: float | None = None) -> bool:
        """Take no more requests and let those that were taken finish.

        Args:
            wait: seconds to wait for them; None: as long as it takes.

        Returns:
            Whether all have finished.
        """
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread.ident is None:
            return not self._queue
        self._thread.join(wait)
        return not self._thread.is_alive()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """End at once: what is running or waiting fails with a StoppedError."""
        with self._wake:
            self._closed = self._stopped = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        else:
            self._end()

    def _check(self, request: Request) -> None:
        sampling, prompt = request.sampling, request.prompt
        if not prompt:
            raise ConfigError("the prompt has no token; write at least one word")
        if not all(0 <= t < self._vocabulary for t in (*prompt, *sampling.logit_bias)):
            raise ConfigError(f"there are token ids outside the vocabulary; expected 0 to {self._vocabulary - 1}")
        if len(prompt) + sampling.max_tokens > self.length:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}, which is more than the "
                f"{self.length} that fit; shorten the prompt or ask for fewer tokens"
            )
        if sampling.n > self.limits.rows:
            raise ConfigError(f"n={sampling.n}; at most {self.limits.rows} answers are written at once")
        if request.columns > self.columns:
            raise ConfigError(
                f"{sampling.n} answers of up to {len(prompt) + sampling.max_tokens} tokens are more than the "
                f"{self.columns} tokens that there is memory for; ask for fewer answers or tokens"
            )

    # ---------------------------------------------------------------- the thread that runs the model

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self.step()
            except Exception as exc:  # of our own: the model's are caught where the requests are known
                log.exception("the engine failed and begins anew")
                self._work.fail(exc, self._all_requests())
                self._work.abandon()
        self._end()

    def _wait_for_work(self) -> bool:
        """False when there won't be any."""
        with self._wake:
            if self._short and not self._work and not self._jobs and not self._stopped:
                self._wake.wait(_PATIENCE)  # for somebody else's block, or a deadline
            while not (self._stopped or self._queue or self._work or self._jobs):
                if self._closed:
                    self._stopped = True
                    break
                self._wake.wait()
            return not self._stopped

    def _end(self) -> None:
        """Nothing comes any more: whoever waits is told."""
        self._work.fail(StoppedError("the engine was stopped"), self._all_requests())
        self._work.abandon()
        with self._wake:
            self._queue.clear()
            self._bookings.unqueue(())
        self._bookings.settle(self._work)
        if self._notify in self.library.holdings.released:
            self.library.holdings.released.remove(self._notify)
        while self._jobs:
            future = self._jobs.popleft()[1]
            if future.set_running_or_notify_cancel():
                future.set_exception(StoppedError("the engine was stopped"))

    def step(self) -> None:
        """A part of the prompts that have come, and a token for every row: what the thread does, over and over."""
        self._do_jobs()
        self._sweep()
        self._admit()
        self._work.step()
        self.stats.waiting = len(self._queue)
        self.stats.steps += 1

    def _do_jobs(self) -> None:
        until = time.monotonic() + _JOBS
        while self._jobs:
            job, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as exc:
                    future.set_exception(exc)
            if time.monotonic() > until:
                break

    def _sweep(self) -> None:
        """Let go of what nobody waits for any more."""
        now = time.monotonic()
        for request in self._all_requests():
            if request.deadline is not None and request.deadline < now:
                seconds = now - request.submitted
                self._work.fail(DeadlineError(f"no answer within {seconds:.0f} s; try again later"), [request])
        with self._wake:
            self._queue = deque(r for r in self._queue if not r.cancelled)
            self._bookings.unqueue(self._queue)
        self._work.forget()
        self._bookings.settle(self._work)

    def _admit(self) -> None:
        """Begin with the next prompts, where there is room."""
        self._short = False
        if self._work.reading or not self._queue:
            return
        lanes = self._work.lanes
        columns = self.columns - sum(r.columns for r in lanes.requests)
        with self._wake:
            group = next_group(self._queue, self.limits.rows - lanes.rows, columns, self.limits.step_tokens)
        group = self._booked(group)
        with self._wake:
            for request in group:
                self._queue.remove(request)
                self._bookings.unqueued(request)
        if group:
            self._work.begin(group)

    def _booked(self, group: list[Request]) -> list[Request]:
        """Those of a group that there is memory for; where there is none for the first, it waits or is refused."""
        while group:
            try:
                self._bookings.begin(group, self._work)
                return group
            except BudgetError as exc:
                if len(group) > 1:
                    group = group[: len(group) // 2]
                    continue
                refusal = self._bookings.refusal(exc, bool(self._work), min(60, math.ceil(self._work.seconds)))
                if refusal is not None:
                    self._work.fail(refusal, group)
                else:
                    self._short = True
                return []
        return []

    def _all_requests(self) -> list[Request]:
        with self._wake:
            waiting = list(self._queue)
        return [*waiting, *self._work.requests]


def _as_list(ends: int | Sequence[int] | None) -> list[int]:
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
