"""Prompts that are read together, and rows that are written together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from foreword.memory import Recall
from foreword.serve._calls import Calls, padded
from foreword.serve._mixing import Choice, choose
from foreword.serve.cache import RowCache
from foreword.serve.request import Answer, Request


class Reading:
    """Some requests' prompts, of like lengths, on their way into a cache.

    A long prompt goes in by parts, so that the rows that are being written don't wait for all of it.
    """

    def __init__(self, calls: Calls, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self.cache = DynamicCache()
        self._calls = calls
        self._batch: tuple[Tensor, Tensor, Choice] | None = None
        self._read = 0

    @property
    def rows(self) -> int:
        """Rows that the requests will be."""
        return sum(r.sampling.n for r in self.requests)

    def go_on(self, tokens: int) -> Tensor | None:
        """Read up to so many tokens more (a column of each prompt at least).

        Returns:
            Scores of the token after each prompt ``(R, V)`` when all is read.
        """
        if self._batch is None:
            choice = choose([r.prefix for r in self.requests], [r.sampling.strength for r in self.requests])
            self._batch = (*padded([r.prompt for r in self.requests], self._calls.device), choice)
        ids, mask, choice = self._batch
        rows, length = ids.shape
        stop = min(length, self._read + max(1, tokens // rows))
        logits = self._calls.prompts(choice, ids[:, self._read : stop], mask, self.cache, self._read)
        self._read = stop
        return logits if stop == length else None


class Lane:
    """Rows that go through the model together, one token each a step.

    Rows are as wide as the longest of them, and prefixes as long as the longest of theirs; what that wastes is
    :attr:`padding`, which the engine keeps within bounds by opening another lane.
    """

    def __init__(self, calls: Calls, *, exact: bool = False) -> None:
        self.answers: list[Answer] = []
        self.cache = RowCache(exact=exact)
        self._calls = calls
        self._choices: dict[tuple[int, int], Choice] = {}  # by rows; until one joins or leaves

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def recall(self) -> Recall | None:
        """How the memories of its rows are read; None: none has one."""
        return next((r for a in self.answers if (r := a.request.recall) is not None), None)

    @property
    def padding(self) -> int:
        """Columns of text and of prefixes that are no row's own."""
        return self.padding_with([])

    def padding_with(self, requests: Sequence[Request]) -> int:
        """What :attr:`padding` would be with a row more of each of these."""
        columns = [*self.cache.lengths, *(len(r.prompt) for r in requests)]
        readers = [*(a.request for a in self.answers), *requests]
        virtual = [r.virtual for r in readers]
        shared = len({id(r.prefix) for r in readers}) == 1  # one for all rows: there is nothing to pad
        wasted = 0 if shared else len(virtual) * max(virtual, default=0) - sum(virtual)
        return len(columns) * max(columns, default=0) - sum(columns) + wasted

    def join(self, source: DynamicCache, picks: Sequence[int], answers: Sequence[Answer]) -> None:
        """Take answers in whose prompts are rows ``picks`` of a cache, each with its first token chosen."""
        self.cache.join(source, picks, [len(a.request.prompt) for a in answers])
        self.answers += answers
        self._choices.clear()

    def leave(self, answer: Answer) -> None:
        """Take an answer out."""
        row = self.answers.index(answer)
        self.cache.leave(row)
        self.answers[row] = self.answers[-1]
        self.answers.pop()
        self._choices.clear()

    def step(self) -> list[tuple[list[Answer], Tensor | Exception]]:
        """Write every row's last token, and give the scores of the next: ``(R, V)`` for the answers beside them.

        Where a pass fails, its rows go through the model in halves until the row that fails stands alone; its answer
        comes with the error, and is to leave.
        """
        self.cache.prepare()
        outcome = self._scores(0, len(self.answers))
        self.cache.advance()
        return outcome

    def _scores(self, first: int, stop: int) -> list[tuple[list[Answer], Tensor | Exception]]:
        rows = self.answers[first:stop]
        try:
            if (first, stop) not in self._choices:
                sampling = [a.sampling.strength for a in rows]
                self._choices[first, stop] = choose([a.request.prefix for a in rows], sampling)
            choice = self._choices[first, stop]
            return [(rows, self._calls.step(choice, [a.tokens[-1] for a in rows], self.cache, first))]
        except Exception as exc:
            if len(rows) == 1:
                return [(rows, exc)]
            middle = (first + stop) // 2
            return [*self._scores(first, middle), *self._scores(middle, stop)]


class Lanes:
    """All rows that are being written.

    Args:
        exact: allocate no places that no row needs: a budget counts them.
    """

    def __init__(self, calls: Calls, *, exact: bool = False) -> None:
        self._calls, self._exact = calls, exact
        self._lanes: list[Lane] = []
        # A lane more costs another reading of the weights, so padding may cost as much before one is opened.
        self.most_padding = weight_bytes(calls) // max(1, kv_bytes(calls))

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._lanes))

    @property
    def rows(self) -> int:
        return sum(map(len, self._lanes))

    @property
    def requests(self) -> list[Request]:
        """Those that the rows are of, each once."""
        return list(dict.fromkeys(a.request for lane in self._lanes for a in lane.answers))

    def place(self, answers: Sequence[Answer]) -> Lane:
        """The lane where a request's rows waste least; a new one where they waste too much everywhere."""
        requests = [a.request for a in answers]
        recall = requests[0].recall
        padding = {
            lane: lane.padding_with(requests)
            for lane in self._lanes
            if None in (recall, lane.recall) or recall == lane.recall
        }
        best = min(padding, key=lambda lane: padding[lane] - lane.padding, default=None)
        if best is None or padding[best] > self.most_padding:
            best = Lane(self._calls, exact=self._exact)
            self._lanes.append(best)
        return best

    def clear(self) -> None:
        """Let finished and cancelled rows leave; close lanes that are empty."""
        for lane in self._lanes:
            for answer in [a for a in lane.answers if a.finish is not None or a.request.cancelled]:
                lane.leave(answer)
        self._lanes = [lane for lane in self._lanes if len(lane)]

    @property
    def nbytes(self) -> int:
        """Allocated for keys and values."""
        return sum(lane.cache.nbytes for lane in self._lanes)

    def tighten(self) -> None:
        """Give back what rows that left had."""
        for lane in self._lanes:
            lane.cache.tighten()

    def close(self, lane: Lane) -> None:
        """Let go of a lane with all its rows."""
        self._lanes = [other for other in self._lanes if other is not lane]


def kv_bytes(calls: Calls) -> int:
    """Bytes of a token's keys and values at all sites."""
    element = torch.empty(0, dtype=calls.model.dtype).element_size()
    return sum(s.parameters(1) for s in calls.library.sites if s.kind == "self") * element


def weight_bytes(calls: Calls) -> int:
    """Bytes that a pass reads of the model."""
    return sum(p.numel() * p.element_size() for p in calls.model.parameters())
