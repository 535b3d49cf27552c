"""``generate`` of a model while something is attached that it has to be told: the task, or where the prompt ends."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

from transformers import PreTrainedModel

from foreword.errors import ForewordError


class Generate:
    """Stands in the model's ``__dict__`` as ``generate``, and calls the model's own inside some contexts.

    A bound method, not a closure: a deep copy of the model then has its own.

    Attributes:
        around: what is entered around each call, given its arguments.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.around: list[Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[Any]]] = []
        self.own: Any = None  # an instance's own that stood there before

    def install(self) -> None:
        if hasattr(self.model, "generate") and self.model.__dict__.get("generate") != self.call:
            self.own = self.model.__dict__.get("generate")
            self.model.__dict__["generate"] = self.call

    def remove(self) -> None:
        if self.model.__dict__.get("generate") != self.call:
            return
        del self.model.__dict__["generate"]
        if self.own is not None:
            self.model.__dict__["generate"] = self.own

    def call(self, *args: Any, **kwargs: Any) -> Any:
        with _telling(kwargs.get("streamer")), ExitStack() as entered:
            for within in self.around:
                entered.enter_context(within(args, kwargs))
            if self.own is not None:
                return self.own(*args, **kwargs)
            return cast(Any, type(self.model)).generate(self.model, *args, **kwargs)


@contextmanager
def _telling(streamer: Any) -> Iterator[None]:
    """An error of ours ends the streamer too, where somebody in another thread waits for text for ever."""
    try:
        yield
    except ForewordError as exc:
        waiting = getattr(streamer, "text_queue", None)
        if isinstance(waiting, queue.Queue):
            waiting.put(_Raising(exc))
        elif isinstance(waiting, asyncio.Queue):
            streamer.loop.call_soon_threadsafe(waiting.put_nowait, _Raising(exc))
        raise


class _Raising:
    """In place of a piece of text: a streamer compares what comes with its end, and that raises."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, error: ForewordError) -> None:
        self.error = error

    def __eq__(self, other: object) -> bool:
        raise self.error
