"""Library: many tasks on one model. Switching changes one context variable and copies nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword import _interface
from foreword._offloaded import device_of
from foreword._queries import Queries
from foreword._views import SitePrefix
from foreword.conditional import part_of
from foreword.errors import AttachError, ConfigError, MismatchError, nearest
from foreword.memory import SiteMemory
from foreword.prefix import Prefix
from foreword.sites import Site
from foreword.sites import sites as find_sites
from foreword.tuning import SiteSlot, require_detached
from foreword.visibility import Visibility


@dataclass(frozen=True, slots=True)
class _Choice:
    """The tasks of a ``use`` block: the prefixes as they were when it began, and what each site reads of them."""

    prefixes: tuple[Prefix | None, ...]  # the different ones
    rows: tuple[int, ...] | None  # which of them each row reads; None: all rows the only one
    views: dict[str, SitePrefix | None] = field(default_factory=dict)


class Library:
    """Frozen prefixes by task name on one model.

    ``use`` holds in its own context only, so threads and asyncio tasks don't disturb each other. Without ``use``
    the model is the base model.

    Args:
        example_inputs: one forward pass's arguments, for models that don't start from token ids.

    Raises:
        AttachError: the model has a prefix attached already.
        UnsupportedModelError: nothing can be placed before this model's keys and values.
    """

    def __init__(self, model: PreTrainedModel, *, example_inputs: Mapping[str, Any] | None = None) -> None:
        require_detached(model)
        self.model = model
        self.sites: list[Site] = find_sites(model, example_inputs)
        self._prefixes: dict[str, Prefix] = {}
        self._queries: Queries | None = None
        self._choice: ContextVar[_Choice | None] = ContextVar("foreword_choice", default=None)
        self._undo = _interface.install(model)
        for site in self.sites:
            model.get_submodule(site.name).__dict__[_interface.SLOT] = SiteSlot(site.name, self)

    @property
    def names(self) -> list[str]:
        """The tasks, in the order that they were added."""
        return list(self._prefixes)

    def __contains__(self, name: str) -> bool:
        return name in self._prefixes

    def __len__(self) -> int:
        return len(self._prefixes)

    def __getitem__(self, name: str) -> Prefix:
        if name not in self._prefixes:
            raise ConfigError(f"no task is named {name!r}; {nearest(name, self._prefixes)}")
        return self._prefixes[name]

    def add(self, name: str, prefix: Prefix, *, force: bool = False) -> None:
        """Hold a prefix under a task name, on the model's device and in its dtype; an older one is replaced.

        Raises:
            MismatchError: the prefix belongs to another model, or its text starts at another position.
            ConfigError: the name is empty, or the prefix brings trained weights, which all rows would share.
        """
        if not name:
            raise ConfigError("a task needs a name")
        if part_of(prefix) is not None:
            raise ConfigError(
                f"task {name!r} depends on a condition vector; give it one: library.add({name!r}, prefix.given(vector))"
            )
        if prefix.parts:
            raise ConfigError(
                f"task {name!r} brings {prefix.parts[0]['method']}, which changes the model for all rows; a library "
                "holds prefixes and memories. Attach it to the model instead: fw.attach(model, prefix)"
            )
        prefix.check_fits(self.model, self.sites, force=force)
        if prefix.position_offset:
            try:
                prefix = prefix.shift(-prefix.position_offset)
            except MismatchError as exc:
                raise MismatchError(
                    f"task {name!r} expects text at position {prefix.position_offset}, and tasks of one batch share "
                    f"their positions: {exc}"
                ) from exc
        if prefix.visible.kind != "all" and self._queries is None:
            self._queries = Queries(self.model, self.sites, offset=0, by_thread=True)
            self._queries.install()
        self._prefixes[name] = prefix.to(self.model.dtype).to(device_of(self.model))

    def remove(self, name: str) -> None:
        """Forget a task. Blocks that use it now go on with it."""
        self[name]
        del self._prefixes[name]

    @contextmanager
    def use(self, tasks: str | Sequence[str | None] | None) -> Iterator[None]:
        """Within the block the model's attention reads these tasks: one name for all rows, or one a row.

        None is the base model. Rows multiplied by beams or return sequences keep their task.

        Raises:
            ConfigError: a task is unknown (the message names near ones), or the list is empty.
        """
        names = (tasks,) if tasks is None or isinstance(tasks, str) else tuple(tasks)
        if not names:
            raise ConfigError("use([]) names no task; name one task a row of the batch")
        different = list(dict.fromkeys(names))
        prefixes = tuple(None if n is None else self[n] for n in different)
        rows = None if tasks is None or isinstance(tasks, str) else tuple(different.index(n) for n in names)
        token = self._choice.set(_Choice(prefixes, rows))
        try:
            yield
        finally:
            self._choice.reset(token)

    def detach(self) -> PreTrainedModel:
        """Take the library off its model, which is then what it was. Returns the model."""
        for site in self.sites:
            slot = self.model.get_submodule(site.name).__dict__.pop(_interface.SLOT, None)
            if slot is None or slot.source is not self:
                raise AttachError("this library is not on its model (any more); nothing to detach")
        if self._queries is not None:
            self._queries.remove()
        _interface.uninstall(self._undo)
        self._prefixes.clear()
        return self.model

    def view(self, site: str) -> SitePrefix | None:
        """What a site reads in this context; None: nothing."""
        choice = self._choice.get()
        if choice is None:
            return None
        if site not in choice.views:
            choice.views[site] = _view(choice, site)
        return choice.views[site]

    def seen(self, site: str, prefix: SitePrefix, query: Tensor) -> Tensor | None:
        """Which queries of a site see the prefixes; None: all."""
        assert self._queries is not None and prefix.seen_by is not None
        return self._queries.seen(site, prefix.seen_by, prefix.rows, query)


def _view(choice: _Choice, site: str) -> SitePrefix | None:
    """The tasks' keys and values at a site: as they are for one task, padded to one tensor for several."""
    here = [p if p is not None and site in p.keys else None for p in choice.prefixes]
    present = [p for p in here if p is not None]
    if not any(p.length(site) or site in p.memory for p in present):
        return None
    longest = max(p.length(site) for p in present)
    like = present[0]
    keys = _stack([_padded(p.keys[site] if p else None, longest, like.keys[site]) for p in here])
    values = _stack([_padded(p.values[site] if p else None, longest, like.values[site]) for p in here])
    rows = torch.tensor(choice.rows, device=keys.device) if choice.rows is not None else None
    heads, dim, out = _shape(site, present)
    gates = [p.gates.get(site) if p else None for p in here]
    gated = torch.tensor([g is not None for g in gates], device=keys.device)
    rules = tuple(p.visible if p else Visibility() for p in here)
    return SitePrefix(
        keys,
        values,
        rows,
        _visible(here, site, longest, keys.device),
        bias=_stacked([p.bias.get(site) if p else None for p in here], (heads,), keys),
        gate=_stacked(gates, (heads,), keys),
        reading=_stacked([p.readings.get(site) if p else None for p in here], (heads, dim + 1), keys),
        seen_by=rules if longest and any(r.kind != "all" for r in rules) else None,
        memory=_memory(site, here, (heads, dim, out), keys),
        gated=gated if bool(gated.any()) and not bool(gated.all()) else None,
    )


def _visible(here: Sequence[Prefix | None], site: str, longest: int, device: torch.device) -> Tensor | None:
    """``(T, longest)``: which tokens are a task's own, or how they count where some are weighed; None: all alike."""
    lengths = torch.tensor([p.length(site) if p else 0 for p in here], device=device)
    own = torch.arange(longest, device=device) < lengths[:, None]
    if not any(p and site in p.log_weights for p in here):
        return None if bool(own.all()) else own
    numbers = torch.zeros(own.shape, device=device).masked_fill_(~own, -torch.inf)
    for row, prefix in zip(numbers, here, strict=True):
        if prefix and site in prefix.log_weights:
            row[: prefix.length(site)] = prefix.log_weights[site].float()
    return numbers


def _shape(site: str, present: Sequence[Prefix]) -> tuple[int, int, int]:
    found = next(s for s in present[0].sites if s.name == site)
    return found.heads, found.key_dim, found.value_dim


def _stacked(each: Sequence[Tensor | None], shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """One tensor for all tasks, ``(T, *shape)``, zero for those that have none; None where no task has one."""
    if all(t is None for t in each):
        return None
    return _stack([t.to(like) if t is not None else like.new_zeros(shape) for t in each])


def _stack(each: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, without a copy of the only one."""
    return torch.stack(list(each)) if len(each) > 1 else each[0].unsqueeze(0)


def _memory(site: str, here: Sequence[Prefix | None], shape: tuple[int, int, int], like: Tensor) -> SiteMemory | None:
    """The tasks' memories at a site: factors where all have the same rank, else whole matrices."""
    holders = [p for p in here if p is not None and site in p.memory]
    if not holders:
        return None
    if len({p.recall for p in holders}) > 1:
        raise AttachError(
            "memories of different activations or queries can't be mixed in one batch; use them one at a time"
        )
    recall = holders[0].recall
    rotation = holders[0].rotations.get(site) if recall.queries == "plain" else None
    heads, dim, out = shape
    ranks = {up.shape[1] if (up := p.memory_up.get(site)) is not None else None for p in holders}
    rank = ranks.pop() if len(ranks) == 1 else None
    if rank is None:
        matrix = _stacked([_whole(p, site) if p else None for p in here], (heads, dim, out), like)
        up = None
    else:
        matrix = _stacked([p.memory.get(site) if p else None for p in here], (heads, dim, rank), like)
        up = _stacked([p.memory_up.get(site) if p else None for p in here], (heads, rank, out), like)
    assert matrix is not None
    return SiteMemory(matrix, up, recall.activation, rotation)


def _whole(prefix: Prefix, site: str) -> Tensor | None:
    """A memory multiplied out: ``(heads, key_dim, value_dim)``."""
    matrix, up = prefix.memory.get(site), prefix.memory_up.get(site)
    return matrix if matrix is None or up is None else matrix @ up


def _padded(tensor: Tensor | None, length: int, like: Tensor) -> Tensor:
    if tensor is None:
        return like.new_zeros(like.shape[0], length, like.shape[2])
    if tensor.shape[1] == length:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[1]))
