"""Forward passes: when the prefix is made anew, and where the text starts.

A trained prefix is made once a pass and read by every layer, also by those that gradient checkpointing runs again
in the backward. It stands on the pass (``foreword._under_way``); those of one call of ``generate`` share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foreword._given import Given, by_task
from foreword._memo import watch_passes
from foreword._text_positions import TextPositions
from foreword._under_way import Pass, Watch, checkpointing, without_boundary
from foreword._views import SitePrefix
from foreword.errors import AttachError

if TYPE_CHECKING:
    from foreword.tuning import Tuning


@dataclass(frozen=True)
class Made:
    """Views, and of what they were made."""

    of: tuple[int, ...]
    given: torch.Tensor | None  # held, so that no other tensor takes its place in memory
    views: dict[str, SitePrefix]


class _Kept:
    """What a call of ``generate`` keeps between its tokens."""

    def __init__(self, passes: Passes, outer: _Kept | None) -> None:
        self.passes, self.outer = passes, outer
        self.made: Made | None = None


_KEPT: ContextVar[_Kept | None] = ContextVar("foreword_kept", default=None)


class Passes:
    """The views that a :class:`~foreword.tuning.Tuning` gives its attention sites, pass by pass."""

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self.given = Given()
        self.watch = Watch(tuning.model, self._begin)
        self.changes = 0  # of what views are made of, beside numbers
        self.fixed: dict[str, SitePrefix] | None = None  # the views where all passes have the same
        self.text: TextPositions | None = None
        self.handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model makes its own views: what a pass made has a graph, which can't be copied."""
        return {**self.__dict__, "fixed": None}

    @property
    def by_pass(self) -> bool:
        """Whether passes may read different prefixes."""
        return self.tuning.trainable or self.tuning.encoder.asks is not None

    @property
    def depth(self) -> int:
        return self.watch.depth

    def view(self, name: str) -> SitePrefix | None:
        """What a site reads in this pass; None: nothing."""
        fixed = self.fixed
        if fixed is None:
            fixed = self._fixed() if not self.by_pass else self._of_pass()
        return fixed.get(name)

    def _fixed(self) -> dict[str, SitePrefix]:
        changes, built = self.changes, self._built(None)
        if changes == self.changes:  # not while another thread was changing it
            self.fixed = built
        return built

    def _of_pass(self) -> dict[str, SitePrefix]:
        now = self.watch.running()
        if now is None:  # a layer or its attention is called by itself
            now = Pass()
            self._prepare(now)
        if now.views is None:
            now.views = self._built(now)
        found: dict[str, SitePrefix] = now.views
        return found

    def seen(self, name: str, prefix: SitePrefix, query: torch.Tensor) -> torch.Tensor | None:
        """Which queries of a site see the prefix; None: all."""
        assert self.tuning.queries is not None and prefix.seen_by is not None
        return self.tuning.queries.seen(name, prefix.seen_by, None, query)  # one rule for all tasks

    def forget(self) -> None:
        """Something that the views were made of has changed."""
        self.changes += 1
        self.fixed = None

    def _built(self, now: Pass | None) -> dict[str, SitePrefix]:
        given, rows = None, None
        if self.tuning.encoder.asks is not None:
            found = self._given(now) if now is not None else None
            if found is None:
                raise self.given.missing(self.tuning.encoder)
            given, rows = by_task(found, self.tuning.encoder)
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self.tuning.build_views(given, rows)
        # What inference mode makes can't be used in a later pass with gradients.
        with torch.inference_mode(False), torch.no_grad():
            return self.tuning.build_views(given, rows)

    def install(self) -> None:
        model = self.tuning.model
        self.handles += watch_passes(model)
        if self.by_pass or self.tuning.visible.kind != "all":
            self.watch.install()
        else:
            self.handles.append(model.register_forward_pre_hook(without_boundary, with_kwargs=True))
        self.text = TextPositions(
            model, self.tuning.sites, offset=self.tuning.position_offset, counted=self.tuning.positions.free
        )
        self.text.install()

    def remove(self) -> None:
        self.watch.remove()
        if self.text is not None:
            self.text.remove()
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.forget()

    def _begin(self, now: Pass, module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a pass reads, and the call's arguments without what isn't the model's."""
        if not self.by_pass:
            return kwargs
        if self.tuning.encoder.asks is not None:
            now.given, kwargs = self.given.take(self.tuning.encoder, self.tuning.tasks, kwargs)
        if torch.is_grad_enabled():
            _check_trainable(self.tuning)
            _check_checkpointing(self.tuning.model)
        self._prepare(now)
        return kwargs

    def _prepare(self, now: Pass) -> None:
        if torch.is_grad_enabled():
            # Now and not in the first layer, whose activations gradient checkpointing throws away.
            now.views = self._built(now)
            return
        # Generation calls the model once a token: the same parameters give the same prefix. Other passes make it anew,
        # since not every change of a parameter shows (``.data``, fused optimizers, functional calls).
        kept = None if torch.compiler.is_compiling() else _KEPT.get()
        while kept is not None and kept.passes is not self:
            kept = kept.outer
        if kept is None or (self.tuning.encoder.training and self.tuning.encoder.dropout):
            return
        given = self._given(now)
        if given is not None and given.is_inference():
            return
        versions = (self.changes, *(p._version for p in self.tuning.holder.parameters()))
        versions += (given._version,) if given is not None else ()
        made = kept.made
        if made is not None and made.of == versions and made.given is given:
            now.views = made.views
            return
        now.views = self._built(now)
        kept.made = Made(versions, given, now.views)

    @contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """What ``generate`` runs in: its passes share what they read."""
        token = _KEPT.set(_Kept(self, _KEPT.get()))
        try:
            yield
        finally:
            _KEPT.reset(token)

    def _given(self, now: Pass) -> torch.Tensor | None:
        """What a pass is given: by the call, or by a block in this context."""
        inside = self.given.inside if now.given is None and self.tuning.encoder.asks is not None else None
        found: torch.Tensor | None = now.given if inside is None else inside
        return found


def _check_trainable(tuning: Tuning) -> None:
    """Raise AttachError where a training pass would train nothing of what was attached to be trained."""
    if tuning.trainable and tuning.model.training and not any(p.requires_grad for p in tuning.holder.parameters()):
        raise AttachError(
            "nothing that foreword attached requires a gradient any more: PEFT's get_peft_model, called after attach, "
            "freezes all that it finds. Attach after get_peft_model, to get_base_model(), or give attach a LoRAConfig "
            "beside the prefix; to train without it, attach what bake() returns"
        )


def _check_checkpointing(model: PreTrainedModel) -> None:
    """Reentrant checkpointing runs a layer's graph from its inputs only: a prefix would get no gradient."""
    if not (model.training and checkpointing(model)):
        return
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise AttachError(
                    "reentrant gradient checkpointing gives a prefix no gradient; call "
                    'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
                )
            return
