"""Where the output of each row begins, for prefixes that only the output sees.

Who knows it says it. In this order: the call (``model(..., boundary=...)``, a column that ``Collator`` makes), an open
block of :func:`boundary`, the labels of the call or of the trainer's batch, the prompt's length in ``generate``, the
cache that the call goes on from. Where nobody does, a pass that needs it raises. It is never taken from another pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreword.errors import AttachError, ConfigError

IGNORED = -100
_CACHED = "_foreword_boundary"  # on a cache: where the output of what it holds begins
_NEVER = 2**62  # an index that no token has


@dataclass(frozen=True)
class Said:
    """What holds in a context.

    Attributes:
        index: of the first output token in the padded sequence, one for all rows or ``(B,)``.
        counted: the same counted from each row's first real token, ``(B,)``.
        labels: of the batch, ``(B, S)``.
        models: whose ``generate`` says it; it holds for these alone. None: anybody's.
        block: whether it is a block of the user's, which comes before labels; with nothing said it is open to the rest.
        elsewhere: whether blocks were open in other contexts when it was said.
    """

    index: int | Tensor | None = None
    counted: Tensor | None = None
    labels: Tensor | None = None
    models: tuple[Any, ...] | None = None
    block: bool = False
    elsewhere: bool = False


_SAID: ContextVar[Said | None] = ContextVar("foreword_boundary", default=None)
_open: set[object] = set()  # blocks of the user's, in any thread
_lock = threading.Lock()


@contextmanager
def boundary(index: int | Tensor | Sequence[int] | None) -> Iterator[None]:
    """Inside the block, the output begins at this index of the token sequence: one for all rows, or one a row.

    Indices count padding on the left. Only infix prefixes ask for it, where neither the call, the labels nor
    ``generate`` say it. The block holds in its own context: a thread that it starts is handed it by
    ``contextvars.copy_context().run``, or raises. None: as if no block were open.

    Raises:
        ConfigError: a negative index, or a tensor that isn't ``(B,)`` integers.
    """
    value: int | Tensor | None = index if isinstance(index, int | None) else torch.as_tensor(index)
    if isinstance(value, Tensor):
        bad = value.dim() != 1 or value.is_floating_point() or bool((value < 0).any())
    else:
        bad = value is not None and value < 0
    if bad:
        raise ConfigError(f"boundary({index}); expected the index of the first output token, one or one a row")
    mark = object()
    with _lock:
        _open.add(mark)
    token = _SAID.set(Said(value, block=True))
    try:
        yield
    finally:
        _SAID.reset(token)
        with _lock:
            _open.discard(mark)


@contextmanager
def told(index: int | Tensor | None = None, *, counted: Any = None, labels: Tensor | None = None) -> Iterator[None]:
    """The same for passes of our own; an open block of the user's comes first."""
    before = _SAID.get()
    if before is not None and before.block and before.index is not None:
        yield
        return
    token = _SAID.set(Said(index, None if counted is None else torch.as_tensor(counted), labels))
    try:
        yield
    finally:
        _SAID.reset(token)


@contextmanager
def prompted(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Inside the block the model's ``generate`` runs with these arguments: the output begins after the prompt.

    Who generates inside it, an assistant that guesses tokens, goes on from this prompt.
    """
    before = _SAID.get()
    if before is not None and (before.index is not None if before.models is None else model in before.models):
        yield
        return
    assistant = kwargs.get("assistant_model")
    said = Said(
        _prompt_length(args, kwargs),
        models=(model,) if assistant is None else (model, assistant),
        elsewhere=before is None and bool(_open),
    )
    token = _SAID.set(said)
    try:
        yield
    finally:
        _SAID.reset(token)


@dataclass
class Call:
    """What is known of a stack's call: B rows of S tokens, of which P came before in a cache."""

    length: int
    past: int
    batch: int
    position_ids: Any
    mask: Any
    cache: Any
    index: Tensor  # (1, S) P, P + 1, ...
    model: Any  # that something is attached to
    counted: Tensor | None  # the call's own
    labels: Tensor | None  # the call's own
    reading: bool  # the outermost call asks for a cache to go on from, so what it reads is the input
    guessed: bool = False  # what was found is what it reads


def find(call: Call, exact: bool) -> Tensor | int:
    """The index of the first output token: a number, ``(B, 1)``, or ``(B, S)`` where rows hold several examples.

    Args:
        exact: whether one token more or less matters: not where the last tokens of the input see the prefix as well.

    Raises:
        AttachError: nobody said it, or what was said doesn't fit.
    """
    found, call.guessed = _found(call, exact)
    if call.cache is not None:
        keep(call.cache, found, call.guessed)
    return found


def keep(cache: Any, found: Tensor | int, guessed: bool) -> None:
    """Have who goes on from a cache know where the output of what it holds begins."""
    if hasattr(cache, "__dict__") and not (isinstance(found, Tensor) and found.shape[1] > 1):
        cache.__dict__[_CACHED] = found, guessed


def _found(call: Call, exact: bool) -> tuple[Tensor | int, bool]:
    said = _SAID.get()
    if said is not None and said.models is not None and call.model not in said.models:
        said = None
    if call.counted is not None:
        return _of_counted(call, call.counted), False
    if said is not None and said.block and said.index is not None:
        _require_one_example(call, said.index)
        return _of_index(call, said.index), False
    if said is not None and said.counted is not None:
        return _of_counted(call, said.counted), False
    if call.labels is not None and _fit(call, call.labels):
        return _of_labels(call, call.labels, exact), False
    if said is not None and said.labels is not None and _fit(call, said.labels):
        return _of_labels(call, said.labels, exact), False
    if said.elsewhere if said is not None else bool(_open):
        raise AttachError(
            "a block of fw.boundary is open in another context, and a thread doesn't take over the block that it was "
            "started in; hand it over, threading.Thread(target=contextvars.copy_context().run, args=(function,)), or "
            "open one in the thread (fw.boundary(None): there is none here)"
        )
    if said is not None and said.index is not None:
        return _of_index(call, said.index), False
    held = getattr(call.cache, _CACHED, None) if call.past else None
    if held is not None and not (held[1] and call.length > 1):
        return (_rows(held[0][:, 0], call.batch) if isinstance(held[0], Tensor) else held[0]), held[1]
    if call.reading and call.past == 0:
        return call.length, True
    raise AttachError(
        "the prefix is an infix, which only the output sees, and nobody said where the output begins; pass "
        "boundary=... (the number of input tokens, one a row) or labels to the call, or make it inside "
        "`with fw.boundary(...)`. generate knows it, and so does a call that goes on from the cache of one that knew"
    )


def _fit(call: Call, labels: Tensor) -> bool:
    return call.past == 0 and labels.shape == (call.batch, call.length)


def _rows(each: Tensor, batch: int) -> Tensor:
    """One a row as ``(B, 1)``: rows are multiplied by beams and return sequences."""
    if batch % len(each):
        raise AttachError(f"boundary names {len(each)} rows, but the batch has {batch}; give one a row")
    return each.repeat_interleave(batch // len(each))[:, None]


def _of_index(call: Call, index: int | Tensor) -> Tensor | int:
    return _rows(index.to(call.index.device), call.batch) if isinstance(index, Tensor) else index


def _require_one_example(call: Call, index: int | Tensor) -> None:
    starts = _packed(call) if isinstance(index, Tensor) or index > 0 else None
    # Positions that stand still at the beginning are those of padding, where there is no mask (B, S) to say so.
    if starts is not None and bool((starts & ((~starts).long().cumsum(1) > 0)).any()):
        raise AttachError(
            "the rows hold several examples each (position_ids start again), and fw.boundary says one index a row; "
            "pass boundary=... to the call, the number of input tokens of each example in turn"
        )


def _of_counted(call: Call, counted: Tensor) -> Tensor | int:
    if counted.dim() > 1 or counted.is_floating_point() or counted.dtype == torch.bool or bool((counted < 0).any()):
        raise ConfigError(f"boundary={counted}; expected the number of input tokens, one or one a row")
    counted = counted.reshape(-1).to(call.index.device)
    starts = _packed(call)
    if starts is not None:
        if len(counted) != int(starts.sum()):
            raise AttachError(
                f"boundary has {len(counted)} numbers, and the rows hold {int(starts.sum())} examples (position_ids "
                "start again); give the number of input tokens of each example in turn"
            )
        example = (starts.flatten().long().cumsum(0) - 1).clamp(min=0)
        begins = starts.flatten().nonzero()[:, 0] % call.length
        return (begins + counted)[example].view(starts.shape)
    found = _rows(counted, call.batch)
    if isinstance(call.mask, Tensor) and call.mask.dim() == 2:
        found = found + (call.mask.long().cumsum(-1) == 0).sum(-1, keepdim=True)  # padding on the left
    return found


def _of_labels(call: Call, labels: Tensor, exact: bool) -> Tensor:
    """The first token that has a label: of each row, or of each example in it."""
    labels = labels.to(call.index.device)
    places = torch.where(labels != IGNORED, call.index, _NEVER)  # (B, S)
    starts = _packed(call)
    if starts is None:
        return places.amin(1, keepdim=True)
    example = (starts.long().cumsum(1) - 1).clamp(min=0)  # (B, S)
    most = int(starts.sum(1).max())
    first = places.new_full((call.batch, most), _NEVER).scatter_reduce(1, example, places, "amin")
    found = first.gather(1, example)
    if exact and bool((starts & (found == call.index + 1)).any()):
        raise AttachError(
            "an example packed into a row has its second token as the first with a label. Packing takes the label off "
            "the first token, so this may be an example without input, or with one token of it; pass boundary=... to "
            'the call, the number of input tokens of each example in turn, use visible="infix:1", or pad the batch'
        )
    return found


def _packed(call: Call) -> Tensor | None:
    """``(B, S)`` bool, where an example begins in rows that hold several: positions start again. None: none does."""
    positions = call.position_ids
    if call.past or call.length < 2 or not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    positions = positions.expand(call.batch, -1).to(call.index.device)
    places = call.index.expand(call.batch, -1)
    real = torch.ones_like(places, dtype=torch.bool)
    if isinstance(call.mask, Tensor) and call.mask.shape == real.shape:
        real = call.mask.to(real.device) > 0
    last = torch.where(real, places, -1).cummax(1).values  # the last real token up to here
    last = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    restart = positions <= positions.gather(1, last.clamp(min=0))
    starts = real & ((last < 0) | restart)
    return starts if bool((starts.sum(1) > 1).any()) else None


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    first = args[0] if args else None
    for given in (kwargs.get("input_ids"), kwargs.get("inputs"), first, kwargs.get("inputs_embeds")):
        if isinstance(given, Tensor) and given.dim() >= 2:
            return given.shape[1]
    return None
