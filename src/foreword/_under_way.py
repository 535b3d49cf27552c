"""Forward passes under way: what belongs to one call of the model, in its own thread, and ends with it.

A pass begins where the outermost transformers model is called (the whole model, or its backbone or encoder alone), and
everything that a call is told (a task, where the output begins) stands on its :class:`Pass`. It is found by context, so
that passes in several threads don't meet. Gradient checkpointing runs layers again in the backward, maybe in a thread
of autograd's and after other passes: the function that it calls brings its own pass along.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel

from foreword.errors import AttachError

BOUNDARY = "boundary"  # the argument of a call, and the column of a batch: where the output of each example begins


class Pass:
    """One call of the model, while it runs and for as long as its backward may ask for it."""

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self.outer: Pass | None = None  # of another model, that this one is called in
        self.modules: list[Any] = []  # the calls of models that are open, from outside in
        self.number = 0  # of the first node of autograd's that it may make
        self.views: Any = None  # what its sites read
        self.given: Any = None  # by the call: a condition or a task
        self.boundary: Tensor | None = None  # by the call
        self.labels: Tensor | None = None
        self.caches = False  # whether the call asks for a cache to go on from
        self.stacks: dict[str, Any] = {}

    def again(self, outer: Pass | None) -> Pass:
        """The same pass for a layer that is run again."""
        copy = Pass()
        copy.__dict__.update(self.__dict__)
        copy.outer, copy.modules = outer, [None]
        return copy


_NOW: ContextVar[Pass | None] = ContextVar("foreword_pass", default=None)


class Watch:
    """Knows which pass of a model this is.

    ``torch.compile`` can't trace context variables without breaking its graph, so compiled code asks for the pass
    that began last, in whichever thread.

    Args:
        begin: called with a pass that begins, the model that was called, and its arguments by name; returns these
            without what isn't the model's.
    """

    def __init__(
        self, model: PreTrainedModel, begin: Callable[[Pass, nn.Module, dict[str, Any]], dict[str, Any]]
    ) -> None:
        self.model, self.begin = model, begin
        self.latest: Pass | None = None
        self.compiled = 0  # calls that are open in compiled code
        self.handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has no pass under way, and none whose backward is to come."""
        return {**self.__dict__, "latest": None, "compiled": 0}

    def install(self) -> None:
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                # Before the other hooks: a pass that fails in one of them is left again.
                self.handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
                self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.latest = None
        for module in self.model.modules():
            function = module.__dict__.get(_CHECKPOINT)
            if isinstance(function, _Carrying):
                module.__dict__[_CHECKPOINT] = function.inner

    @property
    def depth(self) -> int:
        """How many calls of models are open, one in the other."""
        now = self.now
        return self.compiled + (len(now.modules) if now is not None else 0)

    @property
    def now(self) -> Pass | None:
        """The pass that this code is called in."""
        if is_compiling():
            return self.latest
        found = _NOW.get()
        while found is not None and found.watch is not self:
            found = found.outer
        return found

    def running(self) -> Pass | None:
        """The pass of an attention call; None where it is called by itself.

        Raises:
            AttachError: a layer is run again in a backward, and which pass it is of can't be known any more.
        """
        now = self.now
        if now is not None or is_compiling():
            return now
        if self.compiled:  # called from compiled code
            return self.latest
        if torch._C._current_graph_task_id() == -1:
            return None
        # In a backward, through a checkpoint function that isn't the model's own.
        node: Any = torch._C._current_autograd_node()
        if self.latest is None or node is None or node._sequence_nr() < self.latest.number:
            raise AttachError(
                "a layer is run again in the backward of a pass that isn't the last one, by a checkpoint function that "
                "doesn't tell which; use model.gradient_checkpointing_enable(), or run each backward before the next "
                "pass"
            )
        return self.latest

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        now = self._opened(module)
        if now is None:
            return None
        now.caches = kwargs.get("past_key_values") is not None or kwargs.get("use_cache") is True
        own = kwargs
        if kwargs.get(BOUNDARY) is not None:
            now.boundary = torch.as_tensor(kwargs[BOUNDARY])
        if BOUNDARY in kwargs:
            own = {k: v for k, v in kwargs.items() if k != BOUNDARY}
        own = self.begin(now, module, own)
        return None if own is kwargs else (args, own)

    def _opened(self, module: nn.Module) -> Pass | None:
        """The pass that begins with this call, if one does."""
        if is_compiling():
            self.compiled = 1 if module is self.model else self.compiled + 1
            if self.compiled > 1:
                return None
            now = Pass()
            now.watch = self
        else:
            held = self.now
            if held is not None and (module is self.model or module in held.modules):
                _NOW.set(held.outer)  # it was interrupted, and its end not seen
                held = None
            if held is not None:
                held.modules.append(module)
                return None
            if self.compiled:
                if module is not self.model:
                    return None
                self.compiled = 0
            now = Pass()
            now.watch, now.outer = self, _NOW.get()
            now.modules = [module]
            _NOW.set(now)
            if torch.is_grad_enabled():
                now.number = torch._C._autograd._get_sequence_nr()
                self._carry()
        self.latest = now
        return now

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_compiling():
            self.compiled = max(0, self.compiled - 1)
            return
        now = self.now
        if now is not None and module in now.modules:
            del now.modules[now.modules.index(module) :]
            if not now.modules:
                _NOW.set(now.outer)
                if self.latest is now and not torch.is_grad_enabled():
                    self.latest = None
        elif self.compiled:
            self.compiled -= 1

    def _carry(self) -> None:
        """Have gradient checkpointing bring the pass along. Each pass looks: it may be switched on at any time."""
        if not (self.model.training and checkpointing(self.model)):
            return
        for module in self.model.modules():
            function = module.__dict__.get(_CHECKPOINT)
            if function is not None and not isinstance(function, _Carrying):
                module.__dict__[_CHECKPOINT] = _Carrying(function, self)


_CHECKPOINT = "_gradient_checkpointing_func"


class _Carrying:
    """A checkpoint function whose layers, when they are run again, are in the pass that they were in."""

    def __init__(self, inner: Any, watch: Watch) -> None:
        self.inner, self.watch = inner, watch

    @property
    def keywords(self) -> dict[str, Any]:
        """As of the ``functools.partial`` that transformers makes: others look here for ``use_reentrant``."""
        return getattr(self.inner, "keywords", {})

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now = None if is_compiling() else self.watch.now
        return self.inner(function if now is None else partial(_within, now, function), *args, **kwargs)


def _within(now: Pass, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if now.modules:  # the first time
        return function(*args, **kwargs)
    token = _NOW.set(now.again(_NOW.get()))
    try:
        return function(*args, **kwargs)
    finally:
        _NOW.reset(token)


def checkpointing(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on."""
    own = hasattr(type(model), "is_activation_checkpointing")
    return bool(getattr(model, "is_activation_checkpointing" if own else "is_gradient_checkpointing", False))


def without_boundary(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A hook for models whose prefix doesn't ask where the output begins: the column of a batch isn't the model's."""
    if BOUNDARY not in kwargs:
        return None
    return args, {k: v for k, v in kwargs.items() if k != BOUNDARY}
