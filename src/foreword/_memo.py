"""What is made once in a forward pass and read by all of its layers: the one place that remembers tensors.

The invariant: an entry is read in the pass and in the thread that made it, and only while the tensor that it was made
from is the same object at the same version. A pass begins where the outermost transformers model is called and ends
when that call returns or raises; then its entries are gone. So two models, a tensor that took another's place in
memory, and numbers that were changed past the version counter (``.data``) between two passes can't meet here.

Layers also run outside of passes, when gradient checkpointing runs them again in the backward. What is made there is
held for as long as the tensor that it was made from lives.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel

_Held = tuple["weakref.ref[Tensor]", "Tensor | int", Tensor, Any]  # the source, its state, what was made of it and with


class _Pass(threading.local):
    """The pass that runs in this thread."""

    def __init__(self) -> None:
        self.open: list[nn.Module] = []  # models that are called, from outside in
        self.memo: dict[tuple[Any, ...], _Held] = {}
        self.kept: dict[tuple[Any, ...], Tensor] = {}
        self.step: Any = None  # what a step of generation decided in its first layer (foreword._step)
        self.padding: Tensor | None = None  # the mask of real tokens that the pass was called with

    @property
    def depth(self) -> int:
        return len(self.open)

    def clear(self) -> None:
        self.memo.clear()  # in place: its entries' weak references hold it, and would have to wait for the collector
        self.kept.clear()
        self.step = self.padding = None


current = _Pass()


def memoised(source: Tensor, key: tuple[Any, ...], make: Callable[[], Tensor], beside: Tensor | None = None) -> Tensor:
    """``make()``, or what it returned before in this pass for the same tensor and key.

    Args:
        beside: another tensor that it is made of, which nobody changes.
    """
    if is_compiling():
        return make()
    memo = current.memo
    key = (id(source), id(beside), *key)  # a model may hand out several masks in turn, one per kind of layer
    held = memo.get(key)
    if held is not None and held[0]() is source and _unchanged(source, held[1]):
        return held[2]
    with torch.inference_mode(False):  # so that what is made has a version counter in any case
        made = make()
    forget = weakref.ref(source, lambda _: memo.pop(key, None))
    memo[key] = (forget, source.clone() if source.is_inference() else source._version, made, beside)
    return made


def kept_in_pass(key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
    """``make()``, once per pass and key; outside of passes, each time."""
    if is_compiling() or not current.open:
        return make()
    found = current.kept.get(key)
    if found is None:
        found = current.kept[key] = make()
    return found


def _unchanged(source: Tensor, state: Tensor | int) -> bool:
    """By the version counter; a tensor made in inference mode has none and is compared with a copy."""
    return torch.equal(source, state) if isinstance(state, Tensor) else source._version == state


def watch_passes(model: PreTrainedModel) -> list[Any]:
    """Have the passes of a model begin and end here, also those of its parts alone; returns the hooks' handles."""
    handles: list[Any] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            handles.append(module.register_forward_pre_hook(_begin, prepend=True))
            handles.append(module.register_forward_hook(_end, always_call=True))
    return handles


def _begin(module: nn.Module, args: Any) -> None:
    if is_compiling():
        return
    if module in current.open:  # that call was interrupted, and its end not seen
        current.open.clear()
    if not current.open:
        current.clear()
    current.open.append(module)


def _end(module: nn.Module, args: Any, output: Any) -> None:
    if is_compiling():
        return
    if module in current.open:
        del current.open[current.open.index(module) :]
    if not current.open:
        current.clear()
