"""What is asked of the engine, and what it says back: pieces of answers, then how each ended."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from foreword.errors import ConfigError
from foreword.memory import Recall
from foreword.prefix import Prefix
from foreword.serve._mixing import recall_of
from foreword.serve._text import Text
from foreword.serve.tiers.held import Held

log = logging.getLogger(__name__)
Finish = Literal["stop", "length"]
MOST_ALTERNATIVES = 20


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is written.

    Attributes:
        max_tokens: of each answer.
        temperature: 0 takes the likeliest token; else the scores are divided by it and a token is drawn.
        top_p: draw from the likeliest tokens that have this probability together; 1: from all.
        top_k: draw from this many likeliest tokens; 0: from all.
        seed: of the draws; None: a new one each time. Answers of one request have each their own draws.
        n: answers to the prompt.
        stop: texts that an answer ends before.
        stop_tokens: tokens that an answer ends at, besides the model's own.
        ignore_eos: go on where the model would end.
        logprobs: give each token's log-probability, and those of so many likeliest tokens; None: none at all. They are
            the model's own: before temperature, penalties and ``logit_bias``.
        presence_penalty: taken off the scores of tokens that the answer has.
        frequency_penalty: taken off, times how often the answer has them.
        logit_bias: added to the scores, by token.
        strength: weight of the prefix against the text: 1 as trained, 0 none.

    Raises:
        ConfigError: a value makes no sense.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (the likeliest token) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("n", self.n >= 1, "1 or more"),
            ("stop", all(self.stop), "texts that aren't empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MOST_ALTERNATIVES,
             f"0 to {MOST_ALTERNATIVES} alternatives"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            ("logit_bias", all(math.isfinite(b) for b in self.logit_bias.values()), "numbers"),
            ("strength", 0 <= self.strength < math.inf, "0 (no prefix) or a positive factor"),
        ):  # fmt: skip
            if not good:
                raise ConfigError(f"{name}={getattr(self, name)}; expected {expected}")

    @property
    def plain(self) -> bool:
        """Whether the model's scores are taken as they are."""
        return not (self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's log-probability, and those of the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What an answer has more than before.

    Attributes:
        index: which of the request's answers.
        text: may be empty while a character or what could be a stop text isn't whole.
        tokens: the tokens that were chosen since the last piece; one that ended the answer is among them.
        scores: of these tokens, where they were asked for.
        finish: ``stop`` (the model ended, or a stop text or token came), ``length``, or None: more is to come.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    scores: tuple[TokenScore, ...] = ()
    finish: Finish | None = None


Sink = Callable[["Piece | Exception"], None]  # called in the engine's thread; must not wait


class Request:
    """A prompt and what has become of it.

    Args:
        prompt: token ids.
        prefix: what its rows read; None: the base model, or not there yet.
        sink: is given each piece, or the error that ended the request.
        deadline: on the clock of ``time.monotonic``; None: it may take as long as it takes.
        task: the version of a task that ``prefix`` will be, once it is on the device.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        prefix: Prefix | None,
        sink: Sink,
        *,
        deadline: float | None = None,
        task: Held | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.sampling = sampling
        self.prefix = prefix
        self.task = task
        self.sink = sink
        self.deadline = deadline
        self.submitted = time.monotonic()
        self.answers: list[Answer] = []
        self.cancelled = False  # set from any thread; the engine looks between steps

    @property
    def virtual(self) -> int:
        """Tokens of its prefix."""
        return self.task.virtual if self.task is not None else self.prefix.longest if self.prefix is not None else 0

    @property
    def recall(self) -> Recall | None:
        """How its prefix's memory is read; None: it has none."""
        return self.task.recall if self.task is not None else recall_of(self.prefix)

    @property
    def columns(self) -> int:
        """Keys and values that its rows may come to hold, in tokens."""
        return self.sampling.n * (len(self.prompt) + self.sampling.max_tokens)

    @property
    def done(self) -> bool:
        return bool(self.answers) and all(a.finish is not None for a in self.answers)

    def tell(self, what: Piece | Exception) -> None:
        """Pass something on; a sink that can't take it (its loop is closed) cancels the request."""
        try:
            self.sink(what)
        except Exception:
            log.debug("a request is cancelled: its sink failed", exc_info=True)
            self.cancelled = True


class Answer:
    """One answer as it is written: a row of a batch."""

    def __init__(self, request: Request, index: int, text: Text, ends: frozenset[int]) -> None:
        sampling = request.sampling
        self.request, self.index, self.text, self.ends = request, index, text, ends
        self.tokens: list[int] = []
        self.counts: dict[int, int] = {}  # how often each token was chosen; kept where a penalty asks
        self.finish: Finish | None = None
        # A generator of its own: what is drawn doesn't depend on the rows beside it.
        self.random = random.Random(None if sampling.seed is None else f"{sampling.seed}/{index}")

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling

    def take(self, token: int, score: TokenScore | None) -> Piece:
        """Go on by a token."""
        sampling = self.sampling
        self.tokens.append(token)
        if not sampling.plain:
            self.counts[token] = self.counts.get(token, 0) + 1
        if token in self.ends:
            text, self.finish = self.text.end(), "stop"
        else:
            text = self.text.add(token)
            if self.text.stopped:
                self.finish = "stop"
            elif len(self.tokens) == sampling.max_tokens:
                text, self.finish = text + self.text.end(), "length"
                if self.text.stopped:  # the last characters made a stop text whole
                    self.finish = "stop"
        return Piece(self.index, text, (token,), (score,) if score is not None else (), self.finish)
