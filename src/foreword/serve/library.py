"""Library: many tasks on one model. Switching changes one context variable and copies nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from foreword import _interface
from foreword._offloaded import device_of
from foreword._queries import Queries
from foreword._views import SitePrefix
from foreword.conditional import part_of
from foreword.errors import AttachError, ConfigError, MismatchError, nearest
from foreword.prefix import Prefix
from foreword.serve._mixing import Choice, view_of
from foreword.sites import Site
from foreword.sites import sites as find_sites
from foreword.tuning import SiteSlot, require_detached


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
        self._choice: ContextVar[Choice | None] = ContextVar("foreword_choice", default=None)
        self._undo = _interface.install(model)
        for site in self.sites:
            model.get_submodule(site.name).__dict__[_interface.SLOT] = SiteSlot(site.name, self)

    @property
    def names(self) -> list[str]:
        """The tasks, in the order that they were added."""
        return list(self._prefixes)

    @property
    def prefixes(self) -> dict[str, Prefix]:
        """The tasks with their prefixes, as they are now."""
        return dict(self._prefixes)

    def __contains__(self, name: str) -> bool:
        return name in self._prefixes

    def __len__(self) -> int:
        return len(self._prefixes)

    def __getitem__(self, name: str) -> Prefix:
        prefix = self._prefixes.get(name)
        if prefix is None:
            raise ConfigError(f"no task is named {name!r}; {nearest(name, self._prefixes)}")
        return prefix

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
        with self.reading(Choice(prefixes, rows)):
            yield

    @contextmanager
    def reading(self, choice: Choice | None) -> Iterator[None]:
        """Within the block the model's attention reads what ``choose`` (or an earlier ``use``) chose; None: nothing.

        For callers that run many passes with the same rows: what the sites read is made in the first pass and kept.
        """
        token = self._choice.set(choice)
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
            choice.views[site] = view_of(choice, site)
        return choice.views[site]

    def seen(self, site: str, prefix: SitePrefix, query: Tensor) -> Tensor | None:
        """Which queries of a site see the prefixes; None: all."""
        assert self._queries is not None and prefix.seen_by is not None
        return self._queries.seen(site, prefix.seen_by, prefix.rows, query)
