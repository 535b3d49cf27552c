"""Proof that a text's keys and values stand for the text: the model with them answers like the prompted model.

A causal model computes for a text what it computes for it at the beginning of a longer one, so its keys and values
before the rest must give the same scores. That holds as far as the rest reads nothing else of the text (a mask made
from values, say) and as far as keys can be moved to where they stand, so it is tried on a few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword._holder import SiteSlot
from foreword._interface import only_slots
from foreword._proof import tensors
from foreword._stacks import positioned_stacks, takes
from foreword._text_positions import placed
from foreword._views import SitePrefix
from foreword.errors import MismatchError
from foreword.positions import Rotation, check_movable, rounding
from foreword.sites import Site, evaluating, input_device, text_inputs

_MOST = 8  # tokens of the text, and of what follows it
_ROOM = 3.0  # times the rounding of keys: scores are the end of all layers
States = dict[str, tuple[Tensor, Tensor]]  # by site, keys (1, G, P, key_dim) and values (1, G, P, value_dim)


def check_text(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rotations: Mapping[str, Rotation],
    ids: Sequence[int],
    offset: int,
) -> str | None:
    """Make sure that a text's keys and values stand for it, right before other text that starts at ``offset``.

    Args:
        sites: where they stand.
        ids: the text's tokens.

    Returns:
        None where they do; where those of no text could in a model of this kind, in words why.

    Raises:
        MismatchError: they don't, in a model where they could.
    """
    name = type(model).__name__
    check_movable(model, sites, rotations, offset - len(ids))
    if model.config.is_encoder_decoder or any(s.kind != "self" for s in sites):
        return f"{name} reads its text in both directions, so what it computes for a text depends on what follows"
    if (layer := _without_attention(model, sites)) is not None:
        return f"{name} carries a text in the state of layers without attention too ({layer}), which no prefix holds"
    stays = offset == len(ids)
    if not stays and any(s.name not in rotations for s in sites):
        return (
            f"{name} has learned positions, to which its keys belong: only position_offset={len(ids)}, the number of "
            "the text's tokens, has it answer as if prompted"
        )
    # A prefix is seen from beyond a sliding window, where a prompt is forgotten: both are tried within it.
    most = min([_MOST, *(max(1, s.sliding_window // 2) for s in sites if s.sliding_window)])
    off = _difference(model, sites, rotations, list(ids)[:most], most, offset, stays)
    if not off <= _ROOM * rounding(model):
        raise MismatchError(
            f"{name} with a text's keys and values before other text answers otherwise than prompted with it (off by "
            f"{off:.2g} of its scores' spread): it reads more of a text than these, or turns more than keys. Give it "
            'the text as a prompt, or train a prefix from init="random"'
        )
    return None


def _without_attention(model: PreTrainedModel, sites: Sequence[Site]) -> str | None:
    """A layer beside those with a site that has none: of a state-space or linear kind; None: all layers have one."""
    with_site = {".".join(s.name.split(".")[:end]) for s in sites for end in range(1, len(s.name.split(".")) + 1)}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name in with_site:
            own = [f"{name}.{i}" for i in range(len(module))]
            return next((layer for layer in own if layer not in with_site), None)
    return None


def _difference(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rotations: Mapping[str, Rotation],
    ids: Sequence[int],
    rest_length: int,
    offset: int,
    stays: bool,
) -> float:
    """How far the scores with a text's keys and values are from those of the prompted model, by the scores' spread."""
    from foreword.initializers import states_of

    text = torch.tensor([list(ids)], device=input_device(model))
    rest = text_inputs(model, rest_length)["input_ids"]
    start = text.shape[1] if stays else offset
    states: States = states_of(model, text, sites)
    for name, rotation in rotations.items():
        if name in states:
            states[name] = rotation(states[name][0], start - text.shape[1]), states[name][1]
    with only_slots(model, lambda _: None):
        whole = _scores(model, torch.cat([text, rest], 1), None)[:, text.shape[1] :]
    standing = _Standing(states)
    with only_slots(model, lambda name: SiteSlot(name, standing) if name in states else None):
        alone = _scores(model, rest, start if positioned_stacks(model, sites) else None, sites)
    spread = (whole - whole.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((alone - whole).square().mean().sqrt() / spread.clamp(min=1e-30))


class _Standing:
    """A source of slots: the same keys and values in every pass."""

    def __init__(self, states: States) -> None:
        self.views = {name: SitePrefix(keys, values) for name, (keys, values) in states.items()}

    def view(self, name: str) -> SitePrefix:
        return self.views[name]


def _scores(model: PreTrainedModel, ids: Tensor, start: int | None, sites: Sequence[Site] = ()) -> Tensor:
    """``(1, S, V)`` in float64 on the CPU, of tokens that start at a position (None: where the model has them)."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    stacks = positioned_stacks(model, sites) if start is not None else []
    with evaluating(model), torch.no_grad(), placed(stacks, (start,) if start is not None else None):
        output = model(**inputs)
    return next(tensors(output)).detach().to("cpu", torch.float64)
