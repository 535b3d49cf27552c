"""Whole answers, for callers that wait for them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from foreword.serve.request import Finish, Piece, Sink, TokenScore


@dataclass(slots=True)
class Written:
    """An answer: its text, tokens, scores where they were asked for, and how it ended."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, piece: Piece) -> None:
        """What it has more."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.scores += piece.scores
        self.finish = piece.finish


def collector(answers: list[Written], done: Future[None]) -> Sink:
    """A sink that puts a request's pieces together, and says when there are no more."""

    def sink(what: Piece | Exception) -> None:
        if isinstance(what, Exception):
            done.set_exception(what)
            return
        answers[what.index].add(what)
        if all(a.finish for a in answers):
            done.set_result(None)

    return sink
