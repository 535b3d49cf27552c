"""What the rows of a pass are given before their prefix is made: the task of each, or a condition vector.

A call of the model says it, ``model(..., task=["a", "b"])`` or ``model(..., condition=vectors)``, where a hook takes it
out again; code that can't change the call (``generate``) runs inside ``with tuning.given(...)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from foreword.encoders import PrefixEncoder
from foreword.errors import AttachError, ConfigError, nearest

Task = str | Sequence[str] | Tensor


_INSIDE: ContextVar[Mapping[Given, Tensor]] = ContextVar("foreword_given", default=MappingProxyType({}))


class Given:
    """What a model's passes inside a block are given: each context (thread, asyncio task) has its own blocks."""

    def __init__(self) -> None:
        self.open = 0  # blocks, in any context
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Given], tuple[()]]:
        """A copy of the model is in no block."""
        return Given, ()

    @contextmanager
    def block(self, value: Tensor) -> Iterator[None]:
        """Inside the block, passes in this context are given this."""
        with self._lock:
            self.open += 1
        token = _INSIDE.set({**_INSIDE.get(), self: value})
        try:
            yield
        finally:
            _INSIDE.reset(token)
            with self._lock:
                self.open -= 1

    @property
    def inside(self) -> Tensor | None:
        """What holds in this context."""
        return _INSIDE.get().get(self)

    def read(self, encoder: PrefixEncoder, tasks: Sequence[str], condition: Any, task: Task | None) -> Tensor:
        """Condition vectors ``(R, C)``, or numbers of tasks ``(R,)``.

        Raises:
            ConfigError: not what the encoder asks for, of another shape, not finite, or an unknown task.
        """
        asks = encoder.asks
        if asks is None:
            raise ConfigError("this prefix is given nothing: it is the same for all rows; leave condition and task out")
        value, other = (condition, task) if asks == "condition" else (task, condition)
        if value is None or other is not None:
            expected = f"condition=vectors of {encoder.condition} numbers" if asks == "condition" else f"task={tasks}"
            raise ConfigError(f"this prefix is given a {asks} and nothing else; expected {expected}")
        return _vectors(value, int(encoder.condition or 0)) if asks == "condition" else _numbers(value, tasks)

    def take(
        self, encoder: PrefixEncoder, tasks: Sequence[str], kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """What a call's arguments say of it, and the arguments without it."""
        said = {name: kwargs[name] for name in ("condition", "task") if kwargs.get(name) is not None}
        found = self.read(encoder, tasks, said.get("condition"), said.get("task")) if said else None
        return found, {k: v for k, v in kwargs.items() if k not in ("condition", "task")}

    def missing(self, encoder: PrefixEncoder) -> AttachError:
        """Nothing was given, and the encoder asks for something."""
        asks = encoder.asks
        found = (
            f"the prefix of each row depends on its {asks}, and none was given; pass {asks}=... to the model's call, "
            f"or call it (and generate) inside `with tuning.given({asks}=...)`"
        )
        if self.open:
            found += (
                ". A block is open in another context, and a thread doesn't take over the block that it is started in; "
                "hand it over, threading.Thread(target=contextvars.copy_context().run, args=(function,)), or open one "
                "in the thread"
            )
        return AttachError(found)


def _vectors(value: Any, size: int) -> Tensor:
    vectors = torch.as_tensor(value)
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    if vectors.dim() != 2 or vectors.shape[1] != size or not len(vectors) or not vectors.is_floating_point():
        raise ConfigError(
            f"condition has shape {tuple(vectors.shape)} and {vectors.dtype}; expected floats (rows, {size}): a vector "
            "for each row, or one for all"
        )
    if not torch.isfinite(vectors).all():
        raise ConfigError("condition has numbers that are not finite; look at what made these vectors")
    return vectors


def _numbers(value: Task, tasks: Sequence[str]) -> Tensor:
    if isinstance(value, Tensor):
        if value.dim() > 1 or value.is_floating_point() or bool(((value < 0) | (value >= len(tasks))).any()):
            raise ConfigError(f"task={value} doesn't number the tasks; expected 0 to {len(tasks) - 1}, one a row")
        return value.long().reshape(-1)
    names = [value] if isinstance(value, str) else list(value)
    for name in names:
        if name not in tasks:
            raise ConfigError(f"no task is named {name!r}; {nearest(str(name), tasks, n=1)}")
    if not names:
        raise ConfigError("task names no task; name one a row, or one for all rows")
    return torch.tensor([tasks.index(name) for name in names])


def by_task(given: Tensor | None, encoder: PrefixEncoder) -> tuple[Tensor | None, Tensor | None]:
    """What the encoder makes in this pass, and which of it each row reads: the batch's tasks once each."""
    if given is None or encoder.asks != "task":
        return given, None
    present, rows = given.unique(return_inverse=True)
    return present, rows if len(present) > 1 else None
