"""Library: many tasks on one model. Switching changes one context variable and copies nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword import _interface
from foreword.attention import SitePrefix
from foreword.errors import AttachError, ConfigError, MismatchError
from foreword.prefix import Prefix
from foreword.sites import Site
from foreword.sites import sites as find_sites
from foreword.tuning import SiteSlot, require_detached


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
            near = difflib.get_close_matches(name, self._prefixes, n=3)
            known = (
                f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(self._prefixes) or 'none'}"
            )
            raise ConfigError(f"no task is named {name!r}; {known}")
        return self._prefixes[name]

    def add(self, name: str, prefix: Prefix, *, force: bool = False) -> None:
        """Hold a prefix under a task name, on the model's device and in its dtype; an older one is replaced.

        Raises:
            MismatchError: the prefix belongs to another model, or its text starts at another position.
            ConfigError: the name is empty.
        """
        if not name:
            raise ConfigError("a task needs a name")
        prefix.check_fits(self.model, self.sites, force=force)
        if prefix.position_offset:
            try:
                prefix = prefix.shift(-prefix.position_offset)
            except MismatchError as exc:
                raise MismatchError(
                    f"task {name!r} expects text at position {prefix.position_offset}, and tasks of one batch share "
                    f"their positions: {exc}"
                ) from exc
        self._prefixes[name] = prefix.to(self.model.dtype).to(self.model.device)

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


def _view(choice: _Choice, site: str) -> SitePrefix | None:
    """The tasks' keys and values at a site: as they are for one task, padded to one tensor for several."""
    here = [p if p is not None and p.keys.get(site, _NOTHING).numel() else None for p in choice.prefixes]
    present = [p for p in here if p is not None]
    if not present:
        return None
    if len(here) == 1:
        only = present[0]
        bias, gate = only.bias.get(site), only.gates.get(site)
        return SitePrefix(only.keys[site].unsqueeze(0), only.values[site].unsqueeze(0), bias=bias, gate=gate)
    if any(site in p.bias or site in p.gates for p in present):
        raise AttachError("tasks with gates can't be mixed with others in one batch; use them one at a time")
    longest = max(p.length(site) for p in present)
    keys = torch.stack([_padded(p.keys[site] if p else None, longest, present[0].keys[site]) for p in here])
    values = torch.stack([_padded(p.values[site] if p else None, longest, present[0].values[site]) for p in here])
    lengths = torch.tensor([p.length(site) if p else 0 for p in here], device=keys.device)
    visible = torch.arange(longest, device=keys.device) < lengths[:, None]
    rows = torch.tensor(choice.rows, device=keys.device)
    return SitePrefix(keys, values, rows, None if bool(visible.all()) else visible)


def _padded(tensor: Tensor | None, length: int, like: Tensor) -> Tensor:
    if tensor is None:
        return like.new_zeros(like.shape[0], length, like.shape[2])
    return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[1]))


_NOTHING = torch.empty(0)
