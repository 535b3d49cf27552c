"""The rows at work: prompts that are read, and answers that are written, a token each a step."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from foreword.errors import ForewordError
from foreword.serve._calls import Calls
from foreword.serve._rows import Lane, Lanes, Reading
from foreword.serve.request import Answer, Request
from foreword.serve.sampling import choose_tokens

log = logging.getLogger(__name__)


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


class Work:
    """What an engine has begun. Belongs to the engine's thread.

    Args:
        step_tokens: prompt tokens that are read in a step.
        stats: what is counted in.
        exact: caches have no more places than rows.
    """

    def __init__(self, calls: Calls, step_tokens: int, stats: Stats, *, exact: bool = False) -> None:
        self._exact = exact
        self.lanes = Lanes(calls, exact=exact)
        self.seconds = 1.0  # of a request, about
        self._calls, self._step_tokens, self._stats = calls, step_tokens, stats
        self._readings: deque[Reading] = deque()

    def __bool__(self) -> bool:
        return bool(self._readings) or len(self.lanes) > 0

    @property
    def reading(self) -> bool:
        """Whether prompts are being read; no others begin before they are."""
        return bool(self._readings)

    @property
    def prompts(self) -> list[Request]:
        """Those whose prompts are being read."""
        return [r for reading in self._readings for r in reading.requests]

    @property
    def requests(self) -> list[Request]:
        return [*self.prompts, *self.lanes.requests]

    def begin(self, group: Sequence[Request]) -> None:
        """Read these prompts next, as one batch."""
        self._readings.append(Reading(self._calls, group))

    def step(self) -> None:
        """A part of the prompts, and a token for every row."""
        if self._readings:
            self._read(self._readings.popleft())
        for lane in self.lanes:
            self._write(lane)
        self.lanes.clear()
        self._count()

    def fail(self, error: Exception, requests: Iterable[Request]) -> None:
        """End requests with an error; they are gone after the next :meth:`forget`."""
        for request in list(requests):
            if request.cancelled or request.done:
                continue
            if not isinstance(error, ForewordError):
                log.error("a request failed", exc_info=error)
            request.cancelled = True
            self._stats.failed += 1
            request.tell(error)

    def forget(self) -> None:
        """Let go of prompts that nobody waits for any more. (Rows leave at the end of a step.)"""
        self._readings = deque(r for r in self._readings if not all(q.cancelled for q in r.requests))

    def abandon(self) -> None:
        """Let go of everything."""
        self._readings.clear()
        self.lanes = Lanes(self._calls, exact=self._exact)

    # ---------------------------------------------------------------- a step

    def _read(self, reading: Reading) -> None:
        """Go on with some prompts; when they are read, choose their first tokens and let their rows join a lane."""
        try:
            logits = reading.go_on(self._step_tokens)
        except Exception as exc:
            if len(reading.requests) == 1:
                self.fail(exc, reading.requests)
            else:  # which of them it was shows when each is read alone
                self._readings.extendleft(Reading(self._calls, [r]) for r in reversed(reading.requests))
            return
        if logits is None:
            self._readings.appendleft(reading)
            return
        self._stats.prompt_tokens += sum(len(r.prompt) for r in reading.requests)
        picks = [row for row, r in enumerate(reading.requests) for _ in range(r.sampling.n)]
        self._choose([a for r in reading.requests for a in r.answers], logits[picks])
        for row, request in enumerate(reading.requests):
            running = [a for a in request.answers if a.finish is None and not request.cancelled]
            if running:
                self._join(reading, row, running)

    def _join(self, reading: Reading, row: int, answers: Sequence[Answer]) -> None:
        lane = self.lanes.place(answers)
        try:
            lane.join(reading.cache, [row] * len(answers), answers)
        except Exception as exc:  # there is no memory for them, and the lane may be half moved
            self.fail(exc, {a.request for a in (*answers, *lane.answers)})
            self.lanes.close(lane)

    def _write(self, lane: Lane) -> None:
        """A token more for every row of a lane."""
        try:
            outcomes = lane.step()
        except Exception as exc:
            self.fail(exc, {a.request for a in lane.answers})
            self.lanes.close(lane)
            return
        for answers, outcome in outcomes:
            if isinstance(outcome, Exception):
                self.fail(outcome, {a.request for a in answers})
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
                self.fail(ForewordError(what), [request])
                continue
            try:
                piece = answer.take(token, score)
            except Exception as exc:
                self.fail(exc, [request])
                continue
            self._stats.written_tokens += 1
            request.tell(piece)
            if request.done:
                self.seconds += 0.1 * (time.monotonic() - request.submitted - self.seconds)

    def _count(self) -> None:
        stats, lanes = self._stats, list(self.lanes)
        stats.reading = sum(r.rows for r in self._readings)
        stats.rows, stats.lanes = self.lanes.rows, len(lanes)
        stats.padding = sum(lane.padding for lane in lanes)
        stats.kv_bytes = self.lanes.nbytes
