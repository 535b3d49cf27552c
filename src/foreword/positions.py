"""Positions: exact rotation of keys, found in the model and proved on its own keys.

A rotary model's keys carry their position: a key made at position p and wanted at p + k is ``R(k) key``. Which
dimensions rotate, in which layout and at which frequencies differs between models, so we take the frequencies from
the model's buffers, try the few layouts there are, and keep the one that turns keys made at one position into the
keys that the model itself makes at another. What cannot be proved is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword.errors import ForewordError, MismatchError
from foreword.sites import Call, Site, dry_run, text_inputs

Layout = Literal["half", "interleaved"]

_SHIFT = 3  # positions between the two runs that a rotation is proved on


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """How one site's keys depend on their position.

    Attributes:
        inv_freq: ``(R/2,)`` radians per position of each rotated pair. Empty: keys don't depend on positions.
        layout: pairs are ``(i, i + R/2)`` ("half", as in Llama) or ``(2i, 2i+1)`` ("interleaved", as in GPT-J).
        start: first rotated dimension of a head; the R dimensions from there rotate.
    """

    inv_freq: Tensor
    layout: Layout = "half"
    start: int = 0

    def __call__(self, keys: Tensor, positions: int | Tensor) -> Tensor:
        """``R(positions) keys`` for keys ``(..., key_dim)``, computed in float64, returned in their dtype.

        Args:
            positions: one number of positions for all, or one for each key, broadcast to ``(...)``.
        """
        width = 2 * len(self.inv_freq)
        if width == 0 or (isinstance(positions, int) and positions == 0):
            return keys
        by = positions if isinstance(positions, int) else positions.to(keys.device)[..., None]
        angle = self.inv_freq.to(keys.device, torch.float64) * by
        cos, sin = angle.cos(), angle.sin()
        rotating = keys[..., self.start : self.start + width].to(torch.float64)
        if self.layout == "half":
            a, b = rotating.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = rotating[..., 0::2], rotating[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([keys[..., : self.start], turned.to(keys.dtype), keys[..., self.start + width :]], dim=-1)

    def equals(self, other: Rotation) -> bool:
        return (self.layout, self.start) == (other.layout, other.start) and torch.equal(
            self.inv_freq.cpu(), other.inv_freq.cpu()
        )


def find_rotations(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Rotation]:
    """The rotation of each site that has one; sites of models with learned or relative positions are left out.

    Costs two forward passes over a few tokens.
    """
    if not takes_positions(model):
        return {}
    candidates = _candidates(model)
    try:
        before, after = _keys_at(model, 0), _keys_at(model, _SHIFT)
    except ForewordError:  # not a text model, or one that refuses positions by hand
        return {}
    found = {}
    for site in sites:
        if site.kind == "cross" or site.name not in before:
            continue
        rotation = _prove(candidates, before[site.name], after[site.name])
        if rotation is not None:
            found[site.name] = rotation
    return found


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model's forward has ``position_ids``."""
    return "position_ids" in inspect.signature(model.forward).parameters


def check_offset(model: PreTrainedModel, offset: int) -> None:
    """Make sure that text can start at ``offset``: positions given by hand must mean what they mean by default.

    Raises:
        MismatchError: the model takes no ``position_ids``, or counts its own positions differently.
    """
    if offset == 0:
        return
    name = type(model).__name__
    if not takes_positions(model):
        raise MismatchError(
            f"position_offset={offset} needs a model that takes position_ids; {name} does not. Use position_offset=0"
        )
    inputs = text_inputs(model)
    positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)[None]
    default, given = {}, {}
    dry_run(model, lambda call, _: default.update({call.name: call.key.clone()}), inputs)
    dry_run(
        model,
        lambda call, _: given.update({call.name: call.key.clone()}),
        {**inputs, "position_ids": positions},
    )
    if any(not torch.equal(default[site], given[site]) for site in default):
        raise MismatchError(
            f"{name} counts its positions in its own way (position_ids 0, 1, 2 … give other keys than none), so "
            f"position_offset={offset} would not mean what it says. Use position_offset=0"
        )


def _keys_at(model: PreTrainedModel, start: int) -> dict[str, Tensor]:
    inputs = text_inputs(model)
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.arange(start, start + length, device=inputs["input_ids"].device)[None]
    keys: dict[str, Tensor] = {}

    def observe(call: Call, _: str) -> None:
        keys.setdefault(call.name, call.key[0].detach().to("cpu", torch.float64))

    dry_run(model, observe, inputs)
    return keys


def _candidates(model: PreTrainedModel) -> list[Tensor]:
    """Every frequency table that the model keeps, each once."""
    tables: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.rsplit(".", 1)[-1].endswith("inv_freq") and buffer.dim() == 1:
            table = buffer.detach().to("cpu", torch.float64)
            if not any(torch.equal(table, t) for t in tables):
                tables.append(table)
    return tables


def _prove(candidates: Sequence[Tensor], before: Tensor, after: Tensor) -> Rotation | None:
    """The candidate that turns ``before`` into ``after`` (both ``(G, S, key_dim)``), or None."""
    size = float(before.abs().max())
    if size == 0 or not before.isfinite().all():
        return None
    # float32 keys agree to 1e-6; half-precision ones to about 1 %, and a wrong layout is off by half.
    tolerance = 0.03 * size
    still = float((after - before).abs().max())
    best, error = (Rotation(torch.empty(0)), still) if still <= 1e-4 * size else (None, tolerance)
    for inv_freq in candidates:
        width = 2 * len(inv_freq)
        starts = {0, before.shape[-1] - width} if width <= before.shape[-1] else set()
        for start in sorted(starts):
            for layout in ("half", "interleaved"):
                rotation = Rotation(inv_freq, layout, start)
                off = float((rotation(before, _SHIFT) - after).abs().max())
                if off < error:
                    best, error = rotation, off
    return best


def group_rotations(rotations: Mapping[str, Rotation]) -> tuple[list[Rotation], dict[str, int]]:
    """The different rotations among the sites, and each site's index into them."""
    groups: list[Rotation] = []
    index = {}
    for site, rotation in rotations.items():
        for i, known in enumerate(groups):
            if known is rotation or known.equals(rotation):
                index[site] = i
                break
        else:
            index[site] = len(groups)
            groups.append(rotation)
    return groups, index
