"""Forward passes: when the prefix is made anew, and where the text starts.

A trained prefix is made once a pass and read by every layer, also by those that gradient checkpointing runs again
in the backward. So what a pass made stays until the next pass begins, and a pass begins where the outermost
transformers model is called: the whole model, or its encoder alone as generation does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foreword._given import Given, by_task
from foreword._memo import watch_passes
from foreword._text_positions import TextPositions
from foreword._views import SitePrefix
from foreword.errors import AttachError

if TYPE_CHECKING:
    from foreword.tuning import Tuning


class Passes:
    """The views that a :class:`~foreword.tuning.Tuning` gives its attention sites, pass by pass."""

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self.views: dict[str, SitePrefix] | None = None
        self.made_from: tuple[int, ...] | None = None
        self.made_of: torch.Tensor | None = None  # held, so that no other tensor takes its place in memory
        self.given = Given()
        self.depth = 0
        self.text: TextPositions | None = None
        self.handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what a pass made, which is of that pass's graph."""
        return {**self.__dict__, "views": None, "made_from": None, "made_of": None, "depth": 0}

    def view(self, name: str) -> SitePrefix | None:
        """What a site reads in this pass; None: nothing."""
        if self.views is None:
            self.views = self._built()
        return self.views.get(name)

    def seen(self, name: str, prefix: SitePrefix, query: torch.Tensor) -> torch.Tensor | None:
        """Which queries of a site see the prefix; None: all."""
        assert self.tuning.queries is not None and prefix.seen_by is not None
        return self.tuning.queries.seen(name, prefix.seen_by, None, query)  # one rule for all tasks

    def forget(self) -> None:
        """Something that the views were made of has changed."""
        self.views, self.made_from = None, None

    def rows(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the encoder is given in this pass, and which of what it makes each row reads."""
        return by_task(self.given.rows(self.tuning.encoder), self.tuning.encoder)

    def _built(self) -> dict[str, SitePrefix]:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self.tuning.build_views()
        # What inference mode makes can't be used in a later pass with gradients.
        with torch.inference_mode(False), torch.no_grad():
            return self.tuning.build_views()

    def install(self) -> None:
        model = self.tuning.model
        self.handles += watch_passes(model)
        if self.tuning.trainable or self.tuning.encoder.asks is not None:
            for module in _models(model):  # before the other hooks: a pass that fails in one of them is left again
                self.handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
                self.handles.append(module.register_forward_hook(self._leave, always_call=True))
        self.text = TextPositions(
            model, self.tuning.sites, offset=self.tuning.position_offset, counted=self.tuning.positions.free
        )
        self.text.install()

    def remove(self) -> None:
        if self.text is not None:
            self.text.remove()
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.forget()

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self.depth += 1
        changed = None
        if self.depth == 1:
            if self.tuning.encoder.asks is not None and module is self.tuning.model:
                changed = args, self.given.take(self.tuning.encoder, self.tuning.tasks, kwargs)
            self._begin(module)
        return changed

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.given.told = None

    def _begin(self, module: nn.Module) -> None:
        if torch.is_grad_enabled():
            _check_trainable(self.tuning)
            _check_checkpointing(self.tuning.model)
            # Now and not in the first layer, whose activations gradient checkpointing throws away.
            self.views, self.made_from = self.tuning.build_views(), None
            return
        # Generation calls the model once a token: the same parameters give the same prefix.
        dropping = self.tuning.encoder.training and self.tuning.encoder.dropout
        given = self.given.now
        versions = None
        if not dropping and (given is None or not given.is_inference()):
            versions = tuple(p._version for p in self.tuning.holder.parameters())
            versions += (given._version,) if given is not None else ()
        if versions is None or versions != self.made_from or given is not self.made_of:
            self.views, self.made_from, self.made_of = None, versions, given


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [m for m in model.modules() if isinstance(m, PreTrainedModel)]


def _check_trainable(tuning: Tuning) -> None:
    """Raise AttachError where a training pass would train nothing of what was attached to be trained."""
    if tuning.trainable and tuning.model.training and next(tuning.parameters(), None) is None:
        raise AttachError(
            "nothing that foreword attached requires a gradient any more: PEFT's get_peft_model, called after attach, "
            "freezes all that it finds. Attach after get_peft_model, to get_base_model(), or give attach a LoRAConfig "
            "beside the prefix; to train without it, attach what bake() returns"
        )


def _check_checkpointing(model: PreTrainedModel) -> None:
    """Reentrant checkpointing runs a layer's graph from its inputs only: a prefix would get no gradient."""
    on = (
        "is_activation_checkpointing"
        if hasattr(type(model), "is_activation_checkpointing")
        else "is_gradient_checkpointing"
    )
    if not (model.training and getattr(model, on, False)):
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
