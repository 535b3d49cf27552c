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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from foreword.errors import ConfigError, DeadlineError, ForewordError, OverloadedError, StoppedError
from foreword.serve._calls import Calls
from foreword.serve._rows import Lane, Lanes, Reading, kv_bytes
from foreword.serve._text import Text
from foreword.serve.admission import Limits, next_group
from foreword.serve.library import Library
from foreword.serve.request import Answer, Request, Sampling, Sink
from foreword.serve.sampling import choose_tokens
from foreword.serve.written import Written, collector

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(slots=True)
class Stats:
    """Counts since the engine was made, and what is at work now."""

    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    waiting: int = 0
    reading: int = 0
    rows: int = 0
    lanes: int = 0
    padding: int = 0
    kv_bytes: int = 0


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
        self._calls = Calls(library)
        self._calls.prove()
        config = library.model.config.get_text_config(decoder=True)
        own = getattr(config, "max_position_embeddings", None) or 4096
        self.length = min(self.limits.length or own, own)
        self.columns = self.limits.columns or self.limits.rows * self.length
        self.ends = frozenset(_as_list(library.model.generation_config.eos_token_id))
        self.column_bytes = kv_bytes(self._calls)  # of keys and values, a token
        self._vocabulary = int(config.vocab_size)
        self._queue: deque[Request] = deque()
        self._readings: deque[Reading] = deque()
        self._lanes = Lanes(self._calls)
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closed = self._stopped = False
        self._seconds = 1.0  # of a request, about
        self._thread = threading.Thread(target=self._run, name="foreword-engine", daemon=True)

    # ---------------------------------------------------------------- for callers, in any thread

    def start(self) -> Engine:
        """Begin to work on what was submitted and what will be. Returns the engine."""
        self._thread.start()
        return self

    @property
    def _ended(self) -> bool:
        return self._thread.ident is not None and not self._thread.is_alive()

    @property
    def accepting(self) -> bool:
        """Whether requests are taken."""
        return not self._closed and not self._ended

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
            StoppedError: the engine takes no requests any more.
        """
        prefix = self.library[task] if task is not None else None
        deadline = None if seconds is None else time.monotonic() + seconds
        request = Request(prompt, sampling, prefix, sink, deadline=deadline)
        self._check(request)
        ends = frozenset(sampling.stop_tokens) | (frozenset() if sampling.ignore_eos else self.ends)
        request.answers = [Answer(request, i, Text(self.tokenizer, sampling.stop), ends) for i in range(sampling.n)]
        with self._wake:
            if not self.accepting:
                raise StoppedError("the engine takes no requests any more; start another one")
            if len(self._queue) >= self.limits.queue:
                after = math.ceil(self._seconds * (len(self._queue) + 1) / self.limits.rows)
                raise OverloadedError(
                    f"{len(self._queue)} requests are waiting, which is the most; try again later",
                    retry_after=min(60, max(1, after)),
                )
            self._queue.append(request)
            self.stats.requests += 1
            self._wake.notify()
        return request

    def cancel(self, request: Request) -> None:
        """End a request, wherever it is; nothing more is said about it."""
        with self._wake:
            if request.cancelled or request.done:
                return
            request.cancelled = True
            self.stats.cancelled += 1
            self._wake.notify()

    def between_steps(self, job: Callable[[], T]) -> Future[T]:
        """Run something in the engine's thread while no pass is under way: changes of the library belong here."""
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

        Args:
            prompts: texts or token ids.
            tasks: one a prompt, or one for all; None: the base model.

        Raises:
            ForewordError: a prompt or task is refused, or one failed; the others are cancelled then.
        """
        names = [tasks] * len(prompts) if tasks is None or isinstance(tasks, str) else list(tasks)
        found = [[Written() for _ in range(sampling.n)] for _ in prompts]
        waits: list[Future[None]] = [Future() for _ in prompts]
        requests = []
        try:
            for prompt, task, answers, wait in zip(prompts, names, found, waits, strict=True):
                ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
                requests.append(self.submit(ids, sampling, task, collector(answers, wait)))
            for wait in waits:
                wait.result()
        finally:
            for request in requests:
                self.cancel(request)
        return found

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
            return True
        self._thread.join(wait)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End at once: what is running or waiting fails with a StoppedError."""
        with self._wake:
            self._closed = self._stopped = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

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
                self._fail(exc, self._all_requests())
                self._readings.clear()
                self._lanes = Lanes(self._calls)
        self._fail(StoppedError("the engine was stopped"), self._all_requests())
        while self._jobs:
            self._jobs.popleft()[1].set_exception(StoppedError("the engine was stopped"))

    def _wait_for_work(self) -> bool:
        """False when there won't be any."""
        with self._wake:
            while not (self._stopped or self._queue or self._readings or len(self._lanes) or self._jobs):
                if self._closed:
                    self._stopped = True
                    break
                self._wake.wait()
            return not self._stopped

    def step(self) -> None:
        """A part of the prompts that have come, and a token for every row: what the thread does, over and over."""
        self._do_jobs()
        self._sweep()
        self._admit()
        if self._readings:
            self._read(self._readings.popleft())
        for lane in self._lanes:
            self._write(lane)
        self._clear()
        self.stats.steps += 1

    def _do_jobs(self) -> None:
        while self._jobs:
            job, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as exc:
                    future.set_exception(exc)

    def _sweep(self) -> None:
        """Let go of what nobody waits for any more."""
        now = time.monotonic()
        late = [r for r in self._all_requests() if r.deadline is not None and r.deadline < now and not r.cancelled]
        for request in late:
            self._fail(DeadlineError(f"no answer within {now - request.submitted:.0f} s; try again later"), [request])
        self._forget([r for r in self._all_requests() if r.cancelled])

    def _admit(self) -> None:
        """Begin with the next prompts, where there is room."""
        if self._readings or not self._queue:
            return
        columns = self.columns - sum(r.columns for r in self._lanes.requests)
        with self._wake:
            rows = self.limits.rows - self._lanes.rows
            group = next_group(self._queue, rows, columns, self.limits.step_tokens)
            for request in group:
                self._queue.remove(request)
        if group:
            self._readings.append(Reading(self._calls, group))

    def _read(self, reading: Reading) -> None:
        """Go on with some prompts; when they are read, choose their first tokens and let their rows join a lane."""
        try:
            logits = reading.go_on(self.limits.step_tokens)
        except Exception as exc:
            if len(reading.requests) == 1:
                self._fail(exc, reading.requests)
            else:  # which of them it was shows when each is read alone
                self._readings.extendleft(Reading(self._calls, [r]) for r in reversed(reading.requests))
            return
        if logits is None:
            self._readings.appendleft(reading)
            return
        self.stats.prompt_tokens += sum(len(r.prompt) for r in reading.requests)
        picks = [row for row, r in enumerate(reading.requests) for _ in range(r.sampling.n)]
        self._choose([a for r in reading.requests for a in r.answers], logits[picks])
        for row, request in enumerate(reading.requests):
            running = [a for a in request.answers if a.finish is None and not request.cancelled]
            if running:
                self._join(reading, row, running)

    def _join(self, reading: Reading, row: int, answers: Sequence[Answer]) -> None:
        lane = self._lanes.place(answers)
        try:
            lane.join(reading.cache, [row] * len(answers), answers)
        except Exception as exc:  # there is no memory for them, and the lane may be half moved
            self._fail(exc, {a.request for a in (*answers, *lane.answers)})
            self._lanes.close(lane)

    def _write(self, lane: Lane) -> None:
        """A token more for every row of a lane."""
        try:
            outcomes = lane.step()
        except Exception as exc:
            self._fail(exc, {a.request for a in lane.answers})
            self._lanes.close(lane)
            return
        for answers, outcome in outcomes:
            if isinstance(outcome, Exception):
                self._fail(outcome, {a.request for a in answers})
            else:
                self._choose(answers, outcome)

    def _choose(self, answers: Sequence[Answer], logits: Tensor) -> None:
        """Go on by a token, and tell."""
        tokens, scores, sound = choose_tokens(logits, answers)
        for answer, token, score, fine in zip(answers, tokens, scores, sound, strict=True):
            request = answer.request
            if request.cancelled:
                continue
            if not fine:
                what = "the model gave numbers that are not finite; the prefix or the model is damaged"
                self._fail(ForewordError(what), [request])
                continue
            try:
                piece = answer.take(token, score)
            except Exception as exc:
                self._fail(exc, [request])
                continue
            self.stats.written_tokens += 1
            request.tell(piece)
            if request.done:
                self._seconds += 0.1 * (time.monotonic() - request.submitted - self._seconds)

    # ---------------------------------------------------------------- leaving

    def _clear(self) -> None:
        self._lanes.clear()
        stats, lanes = self.stats, list(self._lanes)
        stats.waiting, stats.reading = len(self._queue), sum(r.rows for r in self._readings)
        stats.rows, stats.lanes = self._lanes.rows, len(lanes)
        stats.padding = sum(lane.padding for lane in lanes)
        stats.kv_bytes = sum(lane.cache.nbytes for lane in lanes)

    def _fail(self, error: Exception, requests: Iterable[Request]) -> None:
        for request in list(requests):
            if not request.cancelled:
                if not isinstance(error, ForewordError):
                    log.error("a request failed", exc_info=error)
                request.cancelled = True
                self.stats.failed += 1
                request.tell(error)
        self._forget([r for r in self._all_requests() if r.cancelled])

    def _forget(self, requests: Sequence[Request]) -> None:
        """Take requests out wherever they are."""
        gone = set(requests)
        if not gone:
            return
        with self._wake:
            self._queue = deque(r for r in self._queue if r not in gone)
        for reading in [r for r in self._readings if gone.issuperset(r.requests)]:
            self._readings.remove(reading)

    def _all_requests(self) -> list[Request]:
        reading = [r for reading in self._readings for r in reading.requests]
        return [*self._queue, *reading, *self._lanes.requests]


def _as_list(ends: int | Sequence[int] | None) -> list[int]:
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
