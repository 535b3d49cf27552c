"""Where in the text the queries of a pass stand, for prefixes that not all of them see.

Each stack of layers (a decoder, an encoder) is told its ids, mask and cache when it is called; a hook reads them.
The boundary between input and output comes from the labels in training, from the prompt's length in ``generate``,
or from :func:`boundary`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword.errors import AttachError, ConfigError
from foreword.sites import Site
from foreword.visibility import Visibility

_BOUNDARY: ContextVar[Tensor | int | None] = ContextVar("foreword_boundary", default=None)


@contextmanager
def boundary(index: int | Tensor | Sequence[int]) -> Iterator[None]:
    """Inside the block, the output begins at this index of the token sequence: one for all rows, or one a row.

    Only infix prefixes ask for it, and only where neither labels nor ``generate`` say it.

    Raises:
        ConfigError: a negative index, or a tensor that isn't ``(B,)`` integers.
    """
    if isinstance(index, int):
        value: int | Tensor = index
        bad = index < 0
    else:
        value = torch.as_tensor(index)
        bad = value.dim() != 1 or value.is_floating_point() or bool((value < 0).any())
    if bad:
        raise ConfigError(f"boundary({index}); expected the index of the first output token, one or one a row")
    token = _BOUNDARY.set(value)
    try:
        yield
    finally:
        _BOUNDARY.reset(token)


class Queries:
    """The positions of the queries at each attention site, pass by pass.

    Args:
        offset: position that the text starts at.
        by_thread: whether passes run in several threads at once (serving). Training must not: gradient
            checkpointing runs layers again in a thread of autograd's.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], *, offset: int, by_thread: bool) -> None:
        self.model = model
        self.offset = offset
        self.state: Any = threading.local() if by_thread else SimpleNamespace()
        self.stack_of = {s.name: _stack(model, s.name) for s in sites}
        self.handles: list[Any] = []

    def install(self) -> None:
        """Watch the model's calls."""
        self.handles.append(self.model.register_forward_pre_hook(self._read_labels, with_kwargs=True))
        for name in dict.fromkeys(self.stack_of.values()):
            # A partial and a bound method, not closures: a deep copy of the model then has its own.
            read = partial(self._read, name)
            self.handles.append(self.model.get_submodule(name).register_forward_pre_hook(read, with_kwargs=True))
        if hasattr(self.model, "generate"):
            self.model.__dict__["generate"] = MethodType(_generate, self.model)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.model.__dict__.pop("generate", None)

    def seen(self, site: str, rules: Sequence[Visibility], rows: Tensor | None, query: Tensor) -> Tensor | None:
        """Which queries of a site see the prefix: ``(B|1, S)`` bool, or None where all do.

        Args:
            rules: one a task.
            rows: ``(R,)`` the task of each row, or None when there is one.
        """
        stacks: dict[str, SimpleNamespace] = self.state.__dict__.setdefault("stacks", {})
        now = stacks.get(self.stack_of[site])
        if now is None or now.length != query.shape[2]:
            raise AttachError(
                f"{site} was called with {query.shape[2]} queries outside a pass of its model, so their positions are "
                'unknown; call the whole model, or use visible="all"'
            )
        key = (tuple(rules), id(rows))
        if key not in now.seen:
            now.seen[key] = self._evaluate(now, rules, rows, query)
        found: Tensor | None = now.seen[key]
        return found

    def _evaluate(
        self, now: SimpleNamespace, rules: Sequence[Visibility], rows: Tensor | None, query: Tensor
    ) -> Tensor | None:
        each = [r.sees(now.positions, now.index, now.boundary).to(query.device) for r in rules]
        if rows is None:
            seen = each[0]
        else:
            batch, length = query.shape[0], query.shape[2]
            task = rows.to(query.device).repeat_interleave(batch // len(rows))
            stacked = torch.stack([e.expand(batch, length) for e in each])  # (T, B, S)
            seen = stacked[task, torch.arange(batch, device=query.device)]
        return None if bool(seen.all()) else seen

    def _read_labels(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        labels = _bound(module, args, kwargs).get("labels")
        self.state.labels = labels if isinstance(labels, Tensor) and labels.dim() == 2 else None

    def _read(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = _bound(module, args, kwargs)
        inputs = given.get("input_ids")
        inputs = inputs if inputs is not None else given.get("inputs_embeds")
        if inputs is None:
            raise AttachError(
                f"{type(module).__name__} was called with neither input_ids nor inputs_embeds, so the positions of its "
                'queries are unknown; use visible="all" with this model'
            )
        length, cache = inputs.shape[1], given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        index = (torch.arange(length, device=inputs.device) + past)[None]
        stacks = self.state.__dict__.setdefault("stacks", {})
        before = stacks.get(name)
        stacks[name] = SimpleNamespace(
            length=length,
            index=index,
            positions=self._positions(given, index),
            boundary=self._boundary(length, past, before, inputs.shape[0]),
            seen={},
        )

    def _positions(self, given: dict[str, Any], index: Tensor) -> Tensor:
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            return positions - self.offset
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -index.shape[1] :]
        return index

    def _boundary(self, length: int, past: int, before: SimpleNamespace | None, batch: int) -> Tensor | int:
        told, labels = _BOUNDARY.get(), getattr(self.state, "labels", None)
        if isinstance(told, Tensor):
            if batch % len(told):
                raise AttachError(f"boundary names {len(told)} rows, but the batch has {batch}; give one a row")
            return told.repeat_interleave(batch // len(told))[:, None]
        if told is not None:
            return told
        if labels is not None and past == 0:
            outputs = labels != -100
            first = outputs.long().argmax(1)
            return torch.where(outputs.any(1), first, labels.shape[1])[:, None]
        # A first call without labels reads the input; what follows on its cache is the output.
        return length if past == 0 or before is None else before.boundary


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the model, which tells an infix where the prompt ends."""
    length = _prompt_length(args, kwargs)
    if length is None or _BOUNDARY.get() is not None:
        return type(model).generate(model, *args, **kwargs)
    with boundary(length):
        return type(model).generate(model, *args, **kwargs)


def _stack(model: PreTrainedModel, site: str) -> str:
    """The innermost model around a site whose call says where its queries stand."""
    names = site.split(".")
    for end in range(len(names) - 1, 0, -1):
        name = ".".join(names[:end])
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel) and _reads_text(module):
            return name
    return ""


def _reads_text(module: nn.Module) -> bool:
    return bool({"input_ids", "inputs_embeds"} & inspect.signature(module.forward).parameters.keys())


def _bound(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    first = args[0] if args else None
    for given in (kwargs.get("input_ids"), kwargs.get("inputs"), first, kwargs.get("inputs_embeds")):
        if isinstance(given, Tensor) and given.dim() >= 2:
            return given.shape[1]
    return None
