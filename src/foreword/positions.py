"""Positions: exact rotation of keys, found in the model and proved on its own keys.

A rotary model's keys carry their position: a key made at position p and wanted at p + k is ``R(k) key``. Which
dimensions rotate, in which layout, which way and at which frequencies differs between models, so we take the
frequencies from the model's buffers, try the few layouts there are, and keep the one that turns keys made at one
position into the keys that the model itself makes at others, while values stay. What cannot be proved is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword._proof import tensors
from foreword._stacks import positioned_stacks
from foreword._text_positions import placed
from foreword.errors import ForewordError, MismatchError
from foreword.sites import Call, Site, dry_run, text_inputs
from foreword.sites import sites as find_sites

Layout = Literal["half", "interleaved"]

_NEAR = (0, 1, 3, 17)  # where the rows start that a rotation is proved on
_NEAREST = (0, 1, 3)
_LENGTHS = {"original_max_seq_len", "max_seq_len_cached", "max_position_embeddings", "original_max_position_embeddings"}
_BEYOND = 3  # positions past the length that frequencies may depend on
# Rounding in the depths of a model: measured at up to 2e-6, 1e-3 and 8e-3 of the keys' size.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


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


@dataclass(frozen=True, slots=True)
class PositionFacts:
    """What was proved of how a model uses positions.

    Attributes:
        rotations: of each site whose keys (and only they) turn with their position; sites of models with learned or
            relative positions, and those where it can't be proved, are left out.
        free: whether the output is the same wherever the text starts, so that only its distance to a prefix matters.
        studied: whether the model could be asked at all.
    """

    rotations: dict[str, Rotation]
    free: bool = False
    studied: bool = False


def study(model: PreTrainedModel, sites: Sequence[Site]) -> PositionFacts:
    """What is true of a model's positions, proved on its own keys and values.

    Costs two forward passes over a few tokens: a batch whose rows start at different positions, and one that reaches
    beyond the length that frequencies may depend on.
    """
    stacks = positioned_stacks(model, sites)
    if not stacks:
        return PositionFacts({})
    try:
        near = _rows_at(model, stacks, _NEAR)
    except ForewordError:
        try:  # a table of positions that ends before
            near = _rows_at(model, stacks, _NEAREST)
        except ForewordError:  # not a text model, or one that refuses positions by hand
            return PositionFacts({})
    tolerance = rounding(model)
    starts = near.starts
    # Logits may have a large mean, beside which a position would be taken for rounding.
    free = _alike(near.output - near.output.mean(-1, keepdim=True), tolerance)
    candidates = _candidates(model) if free else []
    if candidates and not _keeps_frequencies(model, stacks, near, tolerance):
        candidates = []
    found = {}
    for site in sites:
        keys = near.keys.get(site.name)
        if site.kind == "cross" or keys is None or not _alike(near.values[site.name], tolerance):
            continue
        rotation = _prove(candidates, keys, starts, tolerance)
        if rotation is not None:
            found[site.name] = rotation
    return PositionFacts(found, free, True)


def find_rotations(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Rotation]:
    """The rotation of each site that has one (:func:`study`)."""
    return study(model, sites).rotations


def check_movable(model: PreTrainedModel, sites: Sequence[Site], rotations: Mapping[str, Rotation], by: int) -> None:
    """Make sure that keys made at one place can stand ``by`` positions from there.

    A model with learned positions has no such place, and its keys are taken as they are.

    Raises:
        MismatchError: keys turn with their position, and how could not be proved.
    """
    still = [s.name for s in sites if s.kind != "cross" and s.name not in rotations]
    if by and still and (_candidates(model) or study(model, sites).free):
        raise MismatchError(
            f"how the keys of {still[0]} depend on their position could not be proved ({type(model).__name__} turns "
            "them in a way of its own, or its frequencies depend on the text's length), so a text's keys can't be "
            "moved. Use position_offset equal to the number of virtual tokens, so that they stay in place, or "
            'init="random"'
        )


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model's forward has ``position_ids``."""
    return "position_ids" in inspect.signature(model.forward).parameters


def check_offset(model: PreTrainedModel, offset: int, sites: Sequence[Site] | None = None) -> None:
    """Make sure that text can start at ``offset``: positions given by hand must mean what they mean by default.

    Args:
        sites: those that a prefix stands at; None: all.

    Raises:
        MismatchError: the model takes no ``position_ids``, or counts its own positions differently.
    """
    if offset == 0:
        return
    name = type(model).__name__
    stacks = positioned_stacks(model, find_sites(model) if sites is None else sites)
    if not stacks:
        raise MismatchError(
            f"position_offset={offset} needs a model that takes position_ids; {name} does not. Use position_offset=0"
        )
    default, given = _rows_at(model, stacks, None), _rows_at(model, stacks, (0,))
    if any(not torch.equal(default.keys[site], given.keys[site]) for site in default.keys):
        raise MismatchError(
            f"{name} counts its positions in its own way (position_ids 0, 1, 2 … give other keys than none), so "
            f"position_offset={offset} would not mean what it says. Use position_offset=0"
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """One pass over the same tokens in each row, each row starting elsewhere; float64 on the CPU."""

    starts: Sequence[int]
    keys: dict[str, Tensor]  # by site (R, G, S, key_dim)
    values: dict[str, Tensor]  # by site (R, G, S, value_dim)
    output: Tensor  # (R, ...)


def _rows_at(model: PreTrainedModel, stacks: Sequence[PreTrainedModel], starts: Sequence[int] | None) -> _Rows:
    rows = len(starts) if starts is not None else 1
    inputs = {n: t.expand(rows, *t.shape[1:]).contiguous() for n, t in text_inputs(model).items()}
    keys: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def observe(call: Call, _: str) -> None:
        for found, states in ((keys, call.key), (values, call.value)):
            found.setdefault(call.name, states.detach().to("cpu", torch.float64))

    with placed(stacks, starts):
        output = dry_run(model, observe, inputs)
    first = next(tensors(output))
    return _Rows(starts or (0,), keys, values, first.detach().to("cpu", torch.float64))


def _keeps_frequencies(
    model: PreTrainedModel, stacks: Sequence[PreTrainedModel], near: _Rows, tolerance: float
) -> bool:
    """Whether a row at 0 has the keys that it has alone when another row of the batch is far away.

    Dynamic NTK and longrope take other frequencies as soon as a text is longer than the model was trained for.
    """
    told = [n for module in model.modules() for n in _lengths_in(vars(module))]
    told += _lengths_in(model.config.to_dict())
    if not told:
        return True
    try:
        far = _rows_at(model, stacks, (0, int(max(told)) + _BEYOND))
    except ForewordError:  # a table that ends there: no text gets so far
        return True
    return all(near_enough(far.keys[n][0], keys[0], tolerance) for n, keys in near.keys.items())


def _lengths_in(described: Mapping[str, Any]) -> list[float]:
    """The lengths that a configuration or a module says it was made for."""
    found = [v for k, v in described.items() if k in _LENGTHS and isinstance(v, int | float)]
    return found + [n for v in described.values() if isinstance(v, Mapping) for n in _lengths_in(v)]


def _candidates(model: PreTrainedModel) -> list[Tensor]:
    """Every frequency table that the model keeps, each once, and turning the other way."""
    tables: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.rsplit(".", 1)[-1].endswith("inv_freq") and buffer.dim() == 1:
            table = buffer.detach().to("cpu", torch.float64)
            if not any(torch.equal(table, t) for t in tables):
                tables.append(table)
    return [*tables, *(-t for t in tables)]


def rounding(model: PreTrainedModel) -> float:
    """How far the same keys may be apart in a model's dtype, as a share of their size."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    return max((_TOLERANCES.get(d, 1e-4) for d in dtypes), default=1e-4)


def near_enough(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors are the same but for rounding: by the mean square of their difference, and its largest."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return False
    off, size = (a - b).abs(), b.abs()
    mean = float(off.square().mean().sqrt()) <= tolerance * float(size.square().mean().sqrt())
    return mean and float(off.max()) <= 8 * tolerance * float(size.max())


def _alike(rows: Tensor, tolerance: float) -> bool:
    """Whether all rows of a batch are the same but for rounding."""
    return all(near_enough(row, rows[0], tolerance) for row in rows[1:])


def _prove(candidates: Sequence[Tensor], keys: Tensor, starts: Sequence[int], tolerance: float) -> Rotation | None:
    """The candidate that turns the keys ``(R, G, S, key_dim)`` of each start into those of each other, or None."""
    if keys.shape[0] != len(starts) or not keys.isfinite().all() or float(keys.abs().max()) == 0:
        return None
    tried = [Rotation(torch.empty(0))]
    for inv_freq in candidates:
        width = 2 * len(inv_freq)
        places = {0, keys.shape[-1] - width} if width <= keys.shape[-1] else set()
        layouts: tuple[Layout, ...] = ("half", "interleaved")
        tried += [Rotation(inv_freq, layout, start) for start in sorted(places) for layout in layouts]

    def turns(rotation: Rotation, i: int, j: int) -> bool:
        return near_enough(rotation(keys[i], starts[j] - starts[i]), keys[j], tolerance)

    pairs = [(i, j) for i in range(len(starts)) for j in range(len(starts)) if i != j]
    proved = [r for r in tried if all(turns(r, i, j) for i, j in pairs)]
    return min(proved, key=lambda r: float((r(keys[0], starts[-1] - starts[0]) - keys[-1]).abs().max()), default=None)


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
