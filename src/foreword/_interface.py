"""How transformers calls us: attention functions pass through a route while something is attached anywhere.

Each attention module asks transformers' ``AttentionInterface`` for a function by the name in its config. While there is
a *slot* on some module, that question is answered with the function it was always answered with, behind a thin wrapper
that looks for a slot on the module that calls it. A module without one gets exactly the function (the *delegate*); with
one, the slot answers and is given the delegate.

Configs, names and the registry stay what they are: model files compare names to decide what they compute, other
libraries look them up, and an implementation that is changed or registered anew while something is attached is simply
the next delegate. With the last slot, wherever it stood, the wrappers are gone.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

SLOT = "_foreword_slot"
_MARK = "__foreword_route__"
_MOST_WRAPPERS = 256  # functions that are made anew for each call are wrapped anew for each call

Delegate = Callable[..., tuple[Tensor, Tensor | None]]


class Slot:
    """What stands on an attention module and answers its calls. The route is there for as long as some slot lives."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Slot:  # also of a copy, and of one that is unpickled
        slot = super().__new__(cls)
        _count(slot)
        return slot

    def __call__(
        self, delegate: Delegate, delegate_name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What the module's attention gives.

        Args:
            delegate: the model's own attention function, under its name in the config (``"eager"`` for the one that
                the model's file defines).
            module: that the slot stands on. The other arguments are the delegate's.
        """
        raise NotImplementedError


class _Inside(threading.local):
    """What holds in this thread."""

    module: Any = None  # whose slot is answering: its delegate may look up another function for it
    plain = False  # whether functions are handed out without their wrappers
    over: Mapping[nn.Module, Slot | None] | None = None  # slots that count in place of those on these modules


_inside = _Inside()
_lock = threading.RLock()  # a weak reference may end while it is held
_slots: dict[int, weakref.ref[Slot]] = {}
_wrappers: dict[tuple[Delegate, str], Delegate] = {}
_before: dict[str, Any] = {}  # what AttentionInterface's own methods were


def _count(slot: Slot) -> None:
    """Have the route there until this slot, and all others, are gone."""
    number = id(slot)

    def gone(_: weakref.ref[Slot]) -> None:
        with _lock:
            _slots.pop(number, None)
            if not _slots:
                _close()

    with _lock:
        _slots[number] = weakref.ref(slot, gone)
        if not _before:
            _open()


def _open() -> None:
    """Put the wrappers before every look-up, of a function by its name or of the one that a model's file brings."""
    get_interface, get_item = AttentionInterface.get_interface, AttentionInterface.__getitem__
    _before.update({"get_interface": get_interface, "__getitem__": get_item})

    @wraps(get_interface)
    def routed_interface(self: AttentionInterface, attn_implementation: str, default: Delegate) -> Delegate:
        function = get_interface(self, attn_implementation, default)
        return (
            function
            if _inside.plain or hasattr(function, _MARK)
            else _wrapper(function, attn_implementation or "eager")
        )

    @wraps(get_item)
    def routed_item(self: AttentionInterface, key: str) -> Delegate:
        function = get_item(self, key)
        return function if _inside.plain else _wrapper(function, key)

    setattr(AttentionInterface, "get_interface", routed_interface)  # noqa: B010
    setattr(AttentionInterface, "__getitem__", routed_item)  # noqa: B010


def _close() -> None:
    """Make the look-ups what they were.

    The garbage collector may do so at any time. So an inherited method stays in the class's own dictionary: whoever is
    looking at it there (``torch.compile``, for its guards) goes on finding it.
    """
    for name, method in _before.items():
        setattr(AttentionInterface, name, method)
    _before.clear()
    _wrappers.clear()


def _wrapper(function: Delegate, name: str) -> Delegate:
    """The function behind a look for a slot; the same wrapper for the same function and name."""
    if is_compiling():
        return _wrapped(function, name)
    try:
        found = _wrappers.get((function, name))
    except TypeError:  # not hashable
        return _wrapped(function, name)
    if found is None:
        found = _wrapped(function, name)
        if len(_wrappers) < _MOST_WRAPPERS:
            _wrappers[function, name] = found
    return found


def _wrapped(function: Delegate, name: str) -> Delegate:
    def route(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        slot = slot_of(module)
        if slot is None:
            return function(module, *args, **kwargs)
        if is_compiling():
            return slot(function, name, module, *args, **kwargs)
        before = _inside.module
        if before is module:  # a function that looks up another: the prefix stands before the text already
            return function(module, *args, **kwargs)
        _inside.module = module
        try:
            return slot(function, name, module, *args, **kwargs)
        finally:
            _inside.module = before

    if not is_compiling():  # which doesn't trace this, and no one looks there
        wraps(function)(route)
    setattr(route, _MARK, True)
    return route


@contextmanager
def afresh() -> Iterator[None]:
    """Inside the block, calls of the module whose slot is answering are calls like any other."""
    before, _inside.module = _inside.module, None
    try:
        yield
    finally:
        _inside.module = before


class _Aside(Slot):
    """Stands on a module for compiled code, which can't tell threads: it finds ``mine``, all other code ``theirs``."""

    def __init__(self, mine: Slot | None, theirs: Slot | None) -> None:
        self.mine, self.theirs = mine, theirs


def slot_of(module: nn.Module) -> Slot | None:
    """The slot that answers a module's calls in this thread."""
    compiling = is_compiling()
    if not compiling and (over := _inside.over) is not None and module in over:
        return over[module]
    slot: Slot | None = getattr(module, "__dict__", {}).get(SLOT)
    while isinstance(slot, _Aside):
        slot = slot.mine if compiling else slot.theirs
    return slot


@contextmanager
def slots_over(slots: Mapping[nn.Module, Slot | None]) -> Iterator[None]:
    """Inside the block and in this thread, these slots (None: no slot) answer in place of those on the modules.

    The modules keep theirs, so that what other threads run meanwhile is what it is.
    """
    before = _inside.over
    _inside.over = {**(before or {}), **slots}
    aside = _set_aside(slots) if "torch._dynamo" in sys.modules else {}
    try:
        yield
    finally:
        _inside.over = before
        _put_back(aside)


def _set_aside(slots: Mapping[nn.Module, Slot | None]) -> dict[nn.Module, _Aside]:
    with _lock:
        aside = {module: _Aside(slot, module.__dict__.get(SLOT)) for module, slot in slots.items()}
        for module, slot in aside.items():
            module.__dict__[SLOT] = slot
    return aside


def _put_back(aside: Mapping[nn.Module, _Aside]) -> None:
    """Take these away again, in whatever order the blocks of several threads end."""
    with _lock:
        for module, mine in aside.items():
            slot = module.__dict__.get(SLOT)
            if slot is mine:
                module.__dict__[SLOT] = mine.theirs
                if mine.theirs is None:
                    del module.__dict__[SLOT]
                continue
            while isinstance(slot, _Aside):
                if slot.theirs is mine:
                    slot.theirs = mine.theirs
                slot = slot.theirs


@contextmanager
def only_slots(model: nn.Module, make: Callable[[str], Slot | None]) -> Iterator[None]:
    """Inside the block and in this thread, each module of a model has the slot that ``make`` gives for its name."""
    slots = {module: make(name) for name, module in model.named_modules()}
    with slots_over(slots), afresh():  # a prefix may be made by passes inside of a call
        yield


@contextmanager
def unrouted() -> Iterator[None]:
    """Inside the block, this thread's models are handed their functions as if nothing were attached anywhere."""
    before, _inside.plain = _inside.plain, True
    try:
        yield
    finally:
        _inside.plain = before


def is_sdpa(delegate: Delegate) -> bool:
    """Whether a delegate is transformers' own call of ``scaled_dot_product_attention``, whatever name it has."""
    return delegate is sdpa_attention_forward


def is_flash(delegate_name: str) -> bool:
    """Whether a delegate takes masks as flash attention does: ``(B, N)``, or none and causal to the last key."""
    made_by = AttentionMaskInterface._global_mapping.get(delegate_name)
    return "flash" in delegate_name or made_by is flash_attention_mask
