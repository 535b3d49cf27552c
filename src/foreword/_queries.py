"""Where in the text the queries of a pass stand, for prefixes that not all of them see.

Each stack of layers (a decoder, an encoder) is told its ids, mask and cache when it is called; a hook reads them.
``foreword._boundary`` says where the output begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword._boundary import Call, find, keep, prompted
from foreword._stacks import bound, stack_of
from foreword._text_positions import default_positions
from foreword._under_way import Watch
from foreword.errors import AttachError
from foreword.sites import Site
from foreword.visibility import Visibility


class Queries:
    """The positions of the queries at each attention site, pass by pass.

    Args:
        offset: position that the text starts at.
        watch: knows the passes.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], *, offset: int, watch: Watch) -> None:
        self.model = model
        self.offset = offset
        self.watch = watch
        self.stack_of = {s.name: stack_of(model, s.name) for s in sites}
        self.handles: list[Any] = []

    def install(self) -> None:
        """Watch the model's calls."""
        self.handles.append(self.model.register_forward_pre_hook(self._read_labels, with_kwargs=True))
        for name in dict.fromkeys(self.stack_of.values()):
            # A partial and a bound method, not closures: a deep copy of the model then has its own.
            module = self.model.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(partial(self._read, name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(partial(self._cached, name)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """What ``generate`` runs in, with these arguments."""
        return prompted(self.model, args, kwargs)

    def seen(self, site: str, rules: Sequence[Visibility], rows: Tensor | None, query: Tensor) -> Tensor | None:
        """Which queries of a site see the prefix: ``(B|1, S)`` bool, or None where all do.

        Args:
            rules: one a task.
            rows: ``(R,)`` the task of each row, or None when there is one.
        """
        under_way = self.watch.running()
        now = under_way.stacks.get(self.stack_of[site]) if under_way is not None else None
        if now is None or now.length != query.shape[2]:
            raise AttachError(
                f"{site} was called with {query.shape[2]} queries outside a pass of its model, so their positions are "
                'unknown; call the whole model, or use visible="all"'
            )
        key = (tuple(rules), id(rows))
        if key not in now.seen:
            now.seen[key] = self._evaluate(now, rules, rows, query), rows  # held, so that its id stays its own
        found: Tensor | None = now.seen[key][0]
        return found

    def _evaluate(
        self, now: SimpleNamespace, rules: Sequence[Visibility], rows: Tensor | None, query: Tensor
    ) -> Tensor | None:
        infixes = [r.first for r in rules if r.kind == "infix"]
        if infixes and now.boundary is None:
            now.boundary = self._boundary(now.call, 0 in infixes)
        each = [r.sees(now.positions, now.call.index, now.boundary).to(query.device) for r in rules]
        if rows is None:
            seen = each[0]
        else:
            batch, length = query.shape[0], query.shape[2]
            task = rows.to(query.device).repeat_interleave(batch // len(rows))
            stacked = torch.stack([e.expand(batch, length) for e in each])  # (T, B, S)
            seen = stacked[task, torch.arange(batch, device=query.device)]
        return None if bool(seen.all()) else seen

    def _boundary(self, call: Call, exact: bool) -> Tensor | int:
        return find(call, exact)

    def _read_labels(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        now = self.watch.now
        labels = bound(module, args, kwargs).get("labels")
        if now is not None and isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
            now.labels = labels

    def _read(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = bound(module, args, kwargs)
        inputs = given.get("input_ids")
        inputs = inputs if inputs is not None else given.get("inputs_embeds")
        if inputs is None:
            raise AttachError(
                f"{type(module).__name__} was called with neither input_ids nor inputs_embeds, so the positions of its "
                'queries are unknown; use visible="all" with this model'
            )
        now = self.watch.now
        if now is None:  # nobody watches this call: its sites will say so
            return
        length, cache = inputs.shape[1], given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        index = (torch.arange(length, device=inputs.device) + past)[None]
        call = Call(
            length, past, inputs.shape[0], given.get("position_ids"), given.get("attention_mask"), cache, index,
            self.model, now.boundary, now.labels,
            reading=now.caches and not (module.training and torch.is_grad_enabled()),
        )  # fmt: skip
        now.stacks[name] = SimpleNamespace(
            length=length, call=call, positions=self._positions(given, index), boundary=None, seen={}
        )

    def _cached(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """The cache that a call has made: who goes on from it has the same boundary."""
        under_way, cache = self.watch.now, getattr(output, "past_key_values", None)
        now = under_way.stacks.get(name) if under_way is not None else None
        if now is not None and now.boundary is not None and cache is not None and now.call.cache is None:
            keep(cache, now.boundary, now.call.guessed)

    def _positions(self, given: dict[str, Any], index: Tensor) -> Tensor:
        positions = given.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            return positions - self.offset
        counted = default_positions(given, given.get("attention_mask"))
        return index if counted is None else counted
