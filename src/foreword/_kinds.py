"""What kind of attention a call is, from what it does: where its keys come from, and who sees whom."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from foreword._interface import afresh


class Streams:
    """Watches what attention modules are called with, so that a call can be made once more with something else.

    Keys that stay what they are while the queries change are another sequence's: that is cross attention, whatever the
    lengths. A module that is given one sequence only is not asked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.handles: list[Any] = []
        self.asking: list[tuple[Tensor, Tensor]] | None = None

    def __enter__(self) -> Streams:
        for module in self.model.modules():
            self.handles.append(module.register_forward_pre_hook(self._take, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._drop))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self.handles:
            handle.remove()

    def _take(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.given[module] = args, kwargs

    def _drop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.given.pop(module, None)

    def cross(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any) -> bool:
        """Whether the keys of this call are of another sequence than its queries."""
        if query.shape[2] != key.shape[2]:
            return True
        given = self.given.get(module)
        if given is None or query.is_meta:
            return False
        args, kwargs = given
        states = {id(t): t for t in (*args, *kwargs.values())
                  if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1 and t is not mask}  # fmt: skip
        if len(states) < 2:
            return False
        moved = [self._moved(module, args, kwargs, which, query, key) for which in states]
        return not any(q and k for q, k in moved) and any(q for q, _ in moved) and any(k for _, k in moved)

    def _moved(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], which: int, query: Tensor, key: Tensor
    ) -> tuple[bool, bool]:
        """Whether queries, and keys, change with one of the tensors that the module was given."""

        def other(value: Any) -> Any:
            if isinstance(value, Cache):  # which has the call's keys already
                return None
            return value * 1.5 + value.roll(1, -1) if id(value) == which else value

        self.asking = []
        try:
            with afresh():
                module(*(other(a) for a in args), **{n: other(v) for n, v in kwargs.items()})
            again = self.asking
        finally:
            self.asking = None
            self.given[module] = args, kwargs
        if not again:
            return False, False
        return not _same(again[0][0], query), not _same(again[0][1], key)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def sees_only_back(module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Any, delegate_name: str) -> bool:
    """Whether a token is hidden from those before it: by the mask where there is one, else as the call decides.

    A picture's tokens may see each other; the text around them is then causal still. And in an encoder, some tokens may
    be hidden from others (padding, queries that don't see the text): causal are tokens that stand in a row, each seeing
    the one before and not the one after.
    """
    if not query.is_meta and query.shape[2] == key.shape[2] and query.shape[2] > 1:
        allowed = _allowed(mask, query, key)
        if allowed is not None:
            return _in_a_row(allowed)
        if mask is None and delegate_name == "eager":
            return False  # eager attention hides nothing by itself
    said = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def _allowed(mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """``(B, S, N)`` which queries see which keys, in some head; None where the mask doesn't say it."""
    batch, _, queries, _ = query.shape
    if isinstance(mask, Tensor) and mask.dim() == 4:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return allowed.any(1).expand(-1, queries, key.shape[2])
    rule = getattr(mask, "mask_mod", None)
    if rule is None:
        return None
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(rule, batch, 1, queries, key.shape[2], device=query.device)[:, 0]


def _in_a_row(allowed: Tensor) -> bool:
    """Whether three tokens (of two: both) see only back: the second sees the first, the third the second."""
    real = allowed.diagonal(dim1=-2, dim2=-1)  # padding isn't seen, by itself neither
    one_way = allowed & ~allowed.mT & real[..., None] & real[..., None, :]
    one_way = one_way.tril(-1)
    if allowed.shape[-1] < 3:
        return bool(one_way.any())
    return bool((one_way.any(-1) & one_way.any(-2)).any())
