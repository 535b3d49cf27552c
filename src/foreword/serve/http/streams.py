"""From the engine's thread to tasks of asyncio, and from there to clients that may leave or not read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from foreword.serve.engine import Engine
from foreword.serve.request import Piece, Request, Sampling

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Bridge:
    """Wakes the loop once for everything that has come since it last looked."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._arrived: deque[tuple[asyncio.Queue[tuple[int, Piece | Exception]], int, Piece | Exception]] = deque()
        self._awake = False

    def put(self, queue: asyncio.Queue[tuple[int, Piece | Exception]], number: int, what: Piece | Exception) -> None:
        """Called in the engine's thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._arrived.append((queue, number, what))  # before looking: who is awake takes it as well
        if not self._awake:
            self._awake = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._awake = False
        while self._arrived:
            queue, number, what = self._arrived.popleft()
            queue.put_nowait((number, what))


class Answers:
    """The pieces of some prompts' answers as they come: ``async for number, piece in answers``.

    Ends when all answers have, or with the error of the first prompt that fails. Whatever happens, :meth:`close` it.
    """

    def __init__(self, engine: Engine, bridge: Bridge) -> None:
        self._engine, self._bridge = engine, bridge
        self._queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._requests: list[Request] = []
        self._open = 0
        self.prompt_tokens = self.written_tokens = 0

    def ask(self, prompts: Sequence[Sequence[int]], sampling: Sampling, task: str | None, seconds: float) -> None:
        """Submit the prompts, all or none.

        Raises:
            ForewordError: as ``Engine.submit``.
        """
        try:
            for number, prompt in enumerate(prompts):

                def sink(what: Piece | Exception, number: int = number) -> None:
                    self._bridge.put(self._queue, number, what)

                self._requests.append(self._engine.submit(prompt, sampling, task, sink, seconds=seconds))
                self.prompt_tokens += len(prompt)
        except BaseException:
            self.close()
            raise
        self._open = len(prompts) * sampling.n

    def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        while self._open:
            number, what = await self._queue.get()
            if isinstance(what, Exception):
                raise what
            self.written_tokens += len(what.tokens)
            if what.finish is not None:
                self._open -= 1
            yield number, what

    def close(self) -> None:
        """Free the rows of what isn't finished."""
        for request in self._requests:
            if not request.done:
                self._engine.cancel(request)


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled when the client leaves.

    Raises:
        ClientGoneError: it has left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. Ends when its events do, when the client leaves, or when it doesn't read for a while.

    Args:
        events: encoded events; closed in any case.
        done: called in the end, also where no event was ever asked for.
        write_seconds: that a client may leave its connection full.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], *, done: Callable[[], None], write_seconds: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._done, self._seconds = events, done, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        finally:  # a generator that was never begun runs no "finally" of its own
            self._done()

    async def _send(self, send: Send) -> None:
        try:
            head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await self._write(send, head)
            async for event in self._events:
                await self._write(send, {"type": "http.response.body", "body": event, "more_body": True})
            await self._write(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except OSError as exc:  # the connection broke while it was written to
            raise ClientGoneError from exc
        finally:
            if (close := getattr(self._events, "aclose", None)) is not None:
                await close()

    async def _write(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await send(message)
        except TimeoutError as exc:
            raise ClientGoneError from exc
