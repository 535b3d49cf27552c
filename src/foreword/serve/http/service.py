"""What the routes have in common: which task is meant, prompts as tokens, answers as they come."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from foreword.errors import ConfigError, nearest
from foreword.serve.engine import Engine
from foreword.serve.http.errors import ApiError
from foreword.serve.http.guard import Notes
from foreword.serve.http.keys import Keys
from foreword.serve.http.metrics import Metrics
from foreword.serve.http.streams import Answers, Bridge
from foreword.serve.request import Piece, Sampling
from foreword.serve.shelf import Shelf

if TYPE_CHECKING:
    from foreword.prefix import Prefix
    from foreword.serve.http.schemas import Common


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a server.

    Attributes:
        base: the name that the base model is asked for by.
        keys: whoever asks must bring one; none: anybody may.
        admin_keys: whoever changes tasks must bring one; none: nobody may.
        shelf: where tasks may be loaded from at run time.
        tasks: the most that are served.
        prompts: the most in one request.
        n: the most answers to a prompt.
        chat_tokens: of an answer to a chat that doesn't say.
        body_bytes: of a request.
        body_seconds: that a request's body may take to arrive.
        write_seconds: that a client may leave its connection full.
        seconds: that an answer may take, the queue included.
        log_prompts: write prompts into the log.
        force: accept prefixes of a base model with other weights at run time.
        folders: on the shelf, of the tasks that were loaded from there to begin with.
        playground: serve the page at ``/``.
        texts: token ids of texts that shares of attention are measured on, for a budget that shortens tasks.
    """

    base: str
    keys: Keys
    admin_keys: Keys
    shelf: Shelf | None = None
    tasks: int = 1000
    prompts: int = 16
    n: int = 8
    chat_tokens: int = 512
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    seconds: float = 300.0
    log_prompts: bool = False
    force: bool = False
    folders: Mapping[str, str] = field(default_factory=dict)
    playground: bool = True
    texts: Sequence[list[int]] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """Where a task came from."""

    folder: str | None
    loaded: int


@dataclass(slots=True)
class Turns:
    """For what is done one at a time, and how many are at it or wait."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


class Service:
    """One server's engine, and what belongs to it. Lives in one event loop."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.library, self.tokenizer = engine.library, engine.tokenizer
        self.metrics = Metrics(engine)
        self.began = int(time.time())
        self.sources = {n: Source(settings.folders.get(n), self.began) for n in self.library.names}
        self.changing = asyncio.Lock()
        self.measuring = Turns()
        self._encoding = threading.Lock()  # a tokenizer's settings are no one thread's own
        self._bridge: Bridge | None = None

    # ---------------------------------------------------------------- tasks

    def task(self, name: str) -> str | None:
        """The task that a model's name means; None: the base model.

        Raises:
            ApiError: 404, there is none; the message has near names.
        """
        if name == self.settings.base:
            return None
        if name not in self.library:
            near = nearest(name, [self.settings.base, *self.library.names])
            raise ApiError(404, f"no model is named {name[:80]!r}; {near}", code="model_not_found", param="model")
        return name

    async def put(
        self, name: str, prefix: Prefix, folder: str | None, *, priority: int | None = None, pinned: bool | None = None
    ) -> bool:
        """Serve a task, in one step; requests that were taken before keep what they had. Returns whether it is new.

        Raises:
            ForewordError: the prefix doesn't fit the model or the budget, or there are too many tasks.
        """
        if name == self.settings.base:
            raise ConfigError(f"{name!r} is the base model's name; choose another one for the task")

        def change() -> bool:
            new = name not in self.library
            if new and len(self.library) >= self.settings.tasks:
                raise ConfigError(f"{len(self.library)} tasks are served, which is the most; unload one first")
            before = self.library.usage.tasks.get(name)
            shares = None
            if self.settings.texts:
                shares = self.library.measure_shares(prefix, self.settings.texts, force=self.settings.force)
            self.library.add(
                name, prefix, shares=shares, force=self.settings.force,
                priority=priority if priority is not None else before.priority if before else 0,
                pinned=pinned if pinned is not None else before is not None and before.pinned,
            )  # fmt: skip
            return new

        new = await asyncio.wrap_future(self.engine.between_steps(change))
        self.sources[name] = Source(folder, int(time.time()))
        return new

    async def drop(self, name: str) -> None:
        """Serve a task no longer, from the next step on; requests that were taken before finish."""
        await asyncio.wrap_future(self.engine.between_steps(lambda: self.library.remove(name)))
        self.sources.pop(name, None)

    # ---------------------------------------------------------------- prompts

    async def encode(self, texts: Sequence[str | list[int]], *, plain: bool = True) -> list[list[int]]:
        """Token ids of texts; ids stay as they are.

        Args:
            plain: with the tokens that the tokenizer puts around a text (chat templates have them already).
        """
        if len(texts) > self.settings.prompts:
            message = f"{len(texts)} prompts; at most {self.settings.prompts} in a request"
            raise ApiError(400, message, param="prompt")
        for text in texts:
            if isinstance(text, str):
                check_text(text, "prompt")

        def work() -> list[list[int]]:
            with self._encoding:
                return [
                    list(self.tokenizer(t, add_special_tokens=plain)["input_ids"]) if isinstance(t, str) else t
                    for t in texts
                ]

        return await asyncio.to_thread(work)

    async def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation in the model's template.

        Raises:
            ApiError: the model has no template, or it refuses the conversation.
        """
        if self.tokenizer.chat_template is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
        for message in messages:
            check_text(message["content"], "messages")
            check_text(message["role"] + message.get("name", ""), "messages")

        def fill() -> str:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

        try:
            text = await asyncio.to_thread(fill)
        except Exception as exc:  # templates are programs, and raise what they like
            raise ApiError(400, f"the model's chat template refuses the messages: {exc}", param="messages") from exc
        return (await self.encode([text], plain=False))[0]

    def check_size(self, prompts: Sequence[list[int]], body: Common, max_tokens: int, param: str) -> None:
        """Raise ApiError for more than the server takes."""
        if body.n > self.settings.n:
            raise ApiError(400, f"n={body.n}; at most {self.settings.n}", param="n")
        longest = max(map(len, prompts))
        if longest + max_tokens > self.engine.length:
            raise ApiError(
                400, f"the prompt has {longest} tokens and max_tokens is {max_tokens}; together at most "
                f"{self.engine.length} fit", code="context_length_exceeded", param=param,
            )  # fmt: skip

    # ---------------------------------------------------------------- answers

    def open(self, request: Request, route: str, body: Common) -> str | None:
        """Find the task, and note what is asked."""
        notes: Notes = request.state.notes
        task = self.task(body.model)
        notes.route, notes.model = route, body.model
        return task

    def ask(self, prompts: Sequence[list[int]], sampling: Sampling, task: str | None) -> Answers:
        """Have prompts answered.

        Raises:
            ForewordError: the engine refuses them.
        """
        if self._bridge is None:
            self._bridge = Bridge(asyncio.get_running_loop())
        answers = Answers(self.engine, self._bridge)
        answers.ask(prompts, sampling, task, self.settings.seconds)
        return answers

    async def follow(self, request: Request, answers: Answers) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces as they come, counted; the rows are free when this is left, however."""
        notes: Notes = request.state.notes
        try:
            first = True
            async for number, piece in answers:
                if first:
                    self.metrics.first.labels(notes.route).observe(time.monotonic() - notes.began)
                    first = False
                yield number, piece
        finally:
            answers.close()
            self.metrics.tokens.labels(notes.model, "prompt").inc(answers.prompt_tokens)
            self.metrics.tokens.labels(notes.model, "answer").inc(answers.written_tokens)
            notes.fields |= {"prompt_tokens": answers.prompt_tokens, "completion_tokens": answers.written_tokens}


def check_text(text: str, param: str) -> None:
    """Raise ApiError for what JSON can name and no text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        what = "half of a surrogate pair; expected text that can be encoded as UTF-8"
        raise ApiError(400, what, param=param) from None
