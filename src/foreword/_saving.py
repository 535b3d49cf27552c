"""``model.save_pretrained`` while something is attached: it writes the base model, and says what it leaves out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from foreword._holder import CHILD
from foreword.errors import AttachError
from foreword.weights import OwnParameters

if TYPE_CHECKING:
    from foreword.tuning import Tuning


def watch(tuning: Tuning) -> None:
    """Stand before the model's ``save_pretrained`` and ``resize_token_embeddings``."""
    for name, function in _WATCHED.items():
        own = tuning.model.__dict__.get(name)  # someone's who stands there already
        tuning.model.__dict__[name] = partial(function, tuning, own)


def unwatch(tuning: Tuning) -> None:
    """Leave both as they were."""
    for name in _WATCHED:
        ours = tuning.model.__dict__.pop(name, None)
        if isinstance(ours, partial) and ours.args[1] is not None:
            tuning.model.__dict__[name] = ours.args[1]


def _save_pretrained(tuning: Tuning, own: Any, *args: Any, **kwargs: Any) -> Any:
    model = tuning.model
    warnings.warn(_left_out(tuning), UserWarning, stacklevel=2)
    state = kwargs.get("state_dict")
    if state is not None:
        state = {n: t for n, t in state.items() if not n.startswith(f"{CHILD}.")}
        for part in tuning.weight_parts():
            state = part.without(state, model)
        kwargs["state_dict"] = state
    with hidden(tuning):
        return own(*args, **kwargs) if own is not None else type(model).save_pretrained(model, *args, **kwargs)


def _resize_token_embeddings(tuning: Tuning, own: Any, *args: Any, **kwargs: Any) -> Any:
    model = tuning.model
    part = next((p for p in tuning.weight_parts() if isinstance(p, OwnParameters)), None)
    if part is not None and (args or kwargs):  # without arguments it only tells
        raise AttachError(
            f"resize_token_embeddings would replace numbers that are trained by {part.method}, which could not be "
            "given back; resize before attaching"
        )
    return own(*args, **kwargs) if own is not None else type(model).resize_token_embeddings(model, *args, **kwargs)


_WATCHED = {"save_pretrained": _save_pretrained, "resize_token_embeddings": _resize_token_embeddings}


@contextmanager
def hidden(tuning: Tuning) -> Iterator[None]:
    """Inside the block the model has the modules and names of its base, and nothing of ours."""
    model = tuning.model
    with ExitStack() as stack:
        for part in tuning.weight_parts():
            stack.enter_context(part.hidden(model))
        holder = model._modules.pop(CHILD)
        try:
            yield
        finally:
            model._modules[CHILD] = holder


def _left_out(tuning: Tuning) -> str:
    parts = tuning.weight_parts()
    beside = (["the prefix"] if tuning.encoder.longest else []) + (["the memory"] if tuning.holder.memory else [])
    beside += [f"the {p.method}" for p in parts if not isinstance(p, OwnParameters)]
    changed = [p.method for p in parts if isinstance(p, OwnParameters)]
    said = []
    if beside:
        said.append(f"save_pretrained does not write {' and '.join(beside)} that foreword attached")
    if changed:
        said.append(f"the base's own numbers are written as {' and '.join(changed)} made them")
    return "; ".join(said) + ". To keep what was attached, call save(folder) on what attach returned"
