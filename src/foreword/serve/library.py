"""Library: many tasks on one model. Switching to a task on the device changes one context variable, no copy is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from enum import Enum
from threading import Lock
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword import _interface
from foreword._generate import Generate
from foreword._memo import watch_passes
from foreword._offloaded import device_of
from foreword._queries import Queries
from foreword._renamed import fitted as under_the_models_names
from foreword._text_positions import TextPositions
from foreword._under_way import Pass, Watch, without_boundary
from foreword._views import SitePrefix
from foreword._wrapped import unwrapped
from foreword.conditional import part_of
from foreword.errors import AttachError, ConfigError, MismatchError
from foreword.generation import write_on
from foreword.positions import study
from foreword.prefix import Prefix
from foreword.serve._mixing import Choice, view_of
from foreword.serve.budget import Budget
from foreword.serve.tiers.forms import prefix_bytes
from foreword.serve.tiers.holdings import Holdings, Promise
from foreword.serve.tiers.measuring import token_shares
from foreword.serve.tiers.usage import Usage
from foreword.sites import Site
from foreword.sites import sites as find_sites
from foreword.storage import Storage
from foreword.tuning import SiteSlot, require_detached


class _Unsaid(Enum):
    """Of a context in which nobody chose."""

    HERE = 0


def _as_it_is(now: Pass, module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs


class Library:
    """Frozen prefixes by task name on one model.

    ``use`` holds in its own context only, so threads and asyncio tasks don't disturb each other. Without ``use``
    the model is the base model; while a block is open in another context, a pass where nobody chose raises instead: it
    may run in a thread that was started inside the block, which doesn't take the block over. ``use(None)`` is the base
    model in any case.

    Args:
        budget: bytes that prefixes may take on the device and in CPU memory, and what is done when they are short;
            None: all are on the device.
        example_inputs: one forward pass's arguments, for models that don't start from token ids.

    Raises:
        AttachError: the model has a prefix attached already.
        UnsupportedModelError: nothing can be placed before this model's keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: Budget | None = None,
        example_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        model = unwrapped(model)
        require_detached(model)
        self.model = model
        self.sites: list[Site] = find_sites(model, example_inputs)
        self.holdings = Holdings(budget or Budget(), device_of(model), model.dtype, self.sites)
        self._queries: Queries | None = None
        self.positions = study(model, self.sites)
        self._text = TextPositions(model, self.sites, offset=0, counted=self.positions.free)
        self._choice: ContextVar[Choice | _Unsaid | None] = ContextVar("foreword_choice", default=_Unsaid.HERE)
        self._blocks: set[object] = set()  # of use that are open, in any context
        self._lock = Lock()
        self._generate = Generate(model)
        self._generate.around.append(self._generating)
        self._generate.install()
        self._handles = [*watch_passes(model), model.register_forward_pre_hook(without_boundary, with_kwargs=True)]
        self._text.install()
        for site in self.sites:
            model.get_submodule(site.name).__dict__[_interface.SLOT] = SiteSlot(site.name, self)

    @property
    def names(self) -> list[str]:
        """The tasks, in the order that they were added."""
        return self.holdings.names

    @property
    def prefixes(self) -> dict[str, Prefix]:
        """The tasks with their prefixes, as they are now; copies of those that aren't on the device."""
        return {name: self.holdings.prefix(name) for name in self.names}

    @property
    def usage(self) -> Usage:
        """How many bytes are where, of which tasks, and what was moved so far."""
        return self.holdings.usage()

    def __contains__(self, name: str) -> bool:
        return name in self.holdings

    def __len__(self) -> int:
        return len(self.holdings)

    def __getitem__(self, name: str) -> Prefix:
        return self.holdings.prefix(name)

    def add(
        self,
        name: str,
        prefix: Prefix,
        *,
        priority: int = 0,
        pinned: bool = False,
        shares: Mapping[str, Tensor] | None = None,
        force: bool = False,
    ) -> None:
        """Hold a copy of a prefix under a task name, in the model's dtype; an older one is replaced.

        It goes to the device if there is room; if not, the budget says what is done.

        Args:
            priority: who is less important makes room for it, and it for those that are as important or more.
            pinned: it stays on the device, as it is.
            shares: of attention of its tokens (:meth:`measure_shares`), for budgets that shorten.
            force: accept a prefix of a base model with other weights (never other shapes).

        Raises:
            BudgetError: the budget leaves no room for it; an older one stays.
            MismatchError: the prefix belongs to another model, or its text starts at another position.
            ConfigError: the name is empty, or the prefix brings trained weights, which all rows would share.
        """
        if not name:
            raise ConfigError("a task needs a name")
        fitted = self.fitted(name, prefix, force=force)
        self.holdings.add(name, fitted, priority=priority, pinned=pinned, shares=shares)

    def fitted(self, name: str, prefix: Prefix, *, force: bool = False) -> Prefix:
        """A prefix as this model's rows can read it. Raises as :meth:`add`."""
        if part_of(prefix) is not None:
            raise ConfigError(
                f"task {name!r} depends on a condition vector; give it one: library.add({name!r}, prefix.given(vector))"
            )
        if prefix.parts:
            raise ConfigError(
                f"task {name!r} brings {prefix.parts[0]['method']}, which changes the model for all rows; a library "
                "holds prefixes and memories. Attach it to the model instead: fw.attach(model, prefix)"
            )
        prefix = under_the_models_names(prefix, self.model, self.sites)
        prefix.check_fits(self.model, self.sites, force=force)
        if prefix.position_offset:
            if self.positions.studied:  # on this model, whatever the file says
                prefix = replace(prefix, rotations=self.positions.rotations)
            try:
                prefix = prefix.shift(-prefix.position_offset)
            except MismatchError as exc:
                raise MismatchError(
                    f"task {name!r} expects text at position {prefix.position_offset}, and tasks of one batch share "
                    f"their positions: {exc}"
                ) from exc
        if prefix.visible.kind != "all" and self._queries is None:
            watch = Watch(self.model, _as_it_is)
            watch.install()
            self._queries = Queries(self.model, self.sites, offset=0, watch=watch)
            self._queries.install()
            self._generate.around.append(self._queries.generating)
        return prefix

    def bytes_of(self, prefix: Prefix, *, storage: Storage | str | None = None) -> int:
        """Bytes that a prefix will take, known before it is added.

        Args:
            storage: in few bits, as ``compress`` writes it: ``"int8"``, ``"int4"``; None: as the model reads it.
        """
        return prefix_bytes(prefix, storage=storage, dtype=self.model.dtype)

    def measure_shares(
        self, prefix: Prefix, texts: Sequence[Sequence[int]], *, force: bool = False
    ) -> dict[str, Tensor]:
        """Each virtual token's mean share of attention, for :meth:`add`: by site ``(kv_heads, length)``.

        No other pass may run meanwhile: where an engine runs, call it with ``engine.between_steps``.

        Args:
            prefix: before it is added.
            texts: token ids of typical prompts, a pass each.
            force: as of :meth:`add`.

        Raises:
            ConfigError: there is no text, or one has no token.
            MismatchError: the prefix is of another model.
        """
        return token_shares(self, prefix, texts, force=force)

    def remove(self, name: str) -> None:
        """Forget a task. Blocks and requests that use it now go on with it."""
        self.holdings.remove(name)

    def pin(self, name: str) -> None:
        """Keep a task on the device, as it is, whatever comes.

        Raises:
            BudgetError: it isn't on the device, and there is no room.
        """
        self.holdings.pin(name, True)

    def unpin(self, name: str) -> None:
        """It makes room for others again."""
        self.holdings.pin(name, False)

    @contextmanager
    def use(self, tasks: str | Sequence[str | None] | None) -> Iterator[None]:
        """Within the block the model's attention reads these tasks: one name for all rows, or one a row.

        None is the base model. Rows multiplied by beams or return sequences keep their task. A thread that is started
        in the block is handed it by ``contextvars.copy_context().run``, and keeps the task to its own end; without, its
        passes raise an AttachError.

        Raises:
            ConfigError: a task is unknown (the message names near ones), or the list is empty.
            BudgetError: there is no room for them on the device beside what is used now. A block never waits.
        """
        names = (tasks,) if tasks is None or isinstance(tasks, str) else tuple(tasks)
        if not names:
            raise ConfigError("use([]) names no task; name one task a row of the batch")
        different = list(dict.fromkeys(names))
        rows = None if tasks is None or isinstance(tasks, str) else tuple(different.index(n) for n in names)
        promise = Promise()
        held = self.holdings.use(
            (n for n in different if n is not None), promise, 0 if rows is None else len(different)
        )
        block = object()
        try:
            ready = {h.name: h.ready for h in held}
            with self._lock:
                self._blocks.add(block)
            with self.reading(Choice(tuple(None if n is None else ready[n] for n in different), rows)):
                yield
        finally:
            with self._lock:
                self._blocks.discard(block)
            self.holdings.release(held, promise)

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        tasks: str | Sequence[str | None] | None = None,
        **options: Any,
    ) -> list[str]:
        """What the model writes after each text, each with its own task, in one batch.

        Args:
            tasks: one for all texts, or one a text; None is the base model.
            options: as for ``model.generate``; with ``num_return_sequences`` a text's answers follow each other.

        Raises:
            ConfigError: a task is unknown, their number is not that of the texts, or a text has no token.
            BudgetError: as :meth:`use`.
        """
        if not texts or isinstance(texts, str):
            raise ConfigError(f"texts={texts!r}; expected a list of at least one text")
        if tasks is not None and not isinstance(tasks, str) and len(tasks) != len(texts):
            raise ConfigError(f"{len(tasks)} tasks for {len(texts)} texts; name one a text, or one for all")
        rows = [tokenizer(text)["input_ids"] for text in texts]
        if not all(rows):
            raise ConfigError(f"text {rows.index([])} has no token; write at least one word")
        with self.use(tasks):
            return write_on(self.model, tokenizer, rows, **options)

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
        self._generate.remove()
        for handle in self._handles:
            handle.remove()
        self._text.remove()
        if self._queries is not None:
            self._queries.remove()
            self._queries.watch.remove()
        self.holdings.close()
        return self.model

    def view(self, site: str) -> SitePrefix | None:
        """What a site reads in this context; None: nothing."""
        choice = self._choice.get()
        if choice is None or choice is _Unsaid.HERE:
            if choice is not None and self._blocks:
                raise self._unsaid()
            return None
        if site not in choice.views:
            choice.views[site] = view_of(choice, site)
        return choice.views[site]

    @contextmanager
    def _generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """What ``generate`` runs in: where nobody chose, the base model to its end, whatever others open meanwhile."""
        if self._choice.get() is not _Unsaid.HERE:
            yield
            return
        if self._blocks:
            raise self._unsaid()
        with self.reading(None):
            yield

    def _unsaid(self) -> AttachError:
        return AttachError(
            "a block of library.use is open in another context, and nobody chose a task in this one. A thread or an "
            "executor doesn't take over the block that it is started in; hand it over, "
            "threading.Thread(target=contextvars.copy_context().run, args=(function,)), or open "
            "`with library.use(task)` in the thread. `with library.use(None)` is the base model"
        )

    def seen(self, site: str, prefix: SitePrefix, query: Tensor) -> Tensor | None:
        """Which queries of a site see the prefixes; None: all."""
        assert self._queries is not None and prefix.seen_by is not None
        return self._queries.seen(site, prefix.seen_by, prefix.rows, query)
