"""What attention reads where the rows of a batch are of different tasks.

A :class:`Choice` holds the tasks' prefixes as they were when it was made, so a task that is replaced or removed
meanwhile stays what it was for those who use it. Its views are made once a site and read by every pass until the rows
change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foreword._views import SitePrefix
from foreword.errors import AttachError
from foreword.memory import Recall, SiteMemory
from foreword.prefix import Prefix
from foreword.visibility import Visibility

_SMALL = 4096  # rows times virtual tokens up to which each row gets a copy, made once, instead of a gather at each call


@dataclass(frozen=True, slots=True)
class Choice:
    """The tasks of some rows, and what each site reads of them.

    Attributes:
        prefixes: the different ones; None: the base model.
        rows: which of them each row reads. None: all rows the only one.
        exact: the batch has these rows and no multiple of them, so each may get a copy of its own.
    """

    prefixes: tuple[Prefix | None, ...]
    rows: tuple[int, ...] | None
    exact: bool = False
    views: dict[str, SitePrefix | None] = field(default_factory=dict)
    shared: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # which tokens there are, by the tasks' lengths


def choose(prefixes: Sequence[Prefix | None], strengths: Sequence[float]) -> Choice:
    """A choice for a batch of just these rows, each with a prefix (None: the base model) and its weight.

    Rows of the same prefix and strength share what they read.
    """
    different: dict[tuple[int, float], Prefix | None] = {}
    rows = []
    for prefix, strength in zip(prefixes, strengths, strict=True):
        key = (id(prefix), strength) if prefix is not None and strength else (0, 0.0)
        if key not in different:
            different[key] = weighed(prefix, strength) if prefix is not None and strength else None
        rows.append(list(different).index(key))
    if len(different) == 1:
        return Choice(tuple(different.values()), None, exact=True)
    return Choice(tuple(different.values()), tuple(rows), exact=True)


def weighed(prefix: Prefix, strength: float) -> Prefix:
    """A prefix whose weight against the text is ``strength`` times its own: 1 is itself.

    A bias of ``log(strength)`` on the prefix's log-sum-exp; gates and memories, which stand outside the softmax, are
    multiplied.
    """
    if strength == 1:
        return prefix
    bias = {}
    for site in prefix.sites:
        if site.name in prefix.gates:
            continue
        own = prefix.bias.get(site.name)
        like = prefix.keys[site.name]
        bias[site.name] = (own if own is not None else like.new_zeros(site.heads)) + math.log(strength)
    return replace(
        prefix,
        bias={**prefix.bias, **bias},
        gates={n: g * strength for n, g in prefix.gates.items()},
        memory={n: m * strength for n, m in prefix.memory.items()},
    )


def recall_of(prefix: Prefix | None) -> Recall | None:
    """How a prefix's memory is read, which all rows of a batch must have in common; None: it has none."""
    return prefix.recall if prefix is not None and prefix.memory else None


def view_of(choice: Choice, site: str) -> SitePrefix | None:
    """The tasks' keys and values at a site: as they are for one task, padded to one tensor for several."""
    here = [p if p is not None and site in p.keys else None for p in choice.prefixes]
    present = [p for p in here if p is not None]
    if not any(p.length(site) or site in p.memory for p in present):
        return None
    longest = max(p.length(site) for p in present)
    like = present[0]
    keys = _stack([_padded(p.keys[site] if p else None, longest, like.keys[site]) for p in here])
    values = _stack([_padded(p.values[site] if p else None, longest, like.values[site]) for p in here])
    visible = _visible(choice, here, site, keys.device)
    rows = torch.tensor(choice.rows, device=keys.device) if choice.rows is not None else None
    heads, dim, out = _shape(site, present)
    gates = [p.gates.get(site) if p else None for p in here]
    gated = torch.tensor([g is not None for g in gates], device=keys.device)
    rules = tuple(p.visible if p else Visibility() for p in here)
    view = SitePrefix(
        keys,
        values,
        rows,
        visible,
        bias=_stacked([p.bias.get(site) if p else None for p in here], (heads,), keys),
        gate=_stacked(gates, (heads,), keys),
        reading=_stacked([p.readings.get(site) if p else None for p in here], (heads, dim + 1), keys),
        seen_by=rules if longest and any(r.kind != "all" for r in rules) else None,
        memory=_memory(site, here, (heads, dim, out), keys),
        gated=gated if bool(gated.any()) and not bool(gated.all()) else None,
    )
    return _one_a_row(view, choice) if choice.exact and rows is not None and len(rows) * longest <= _SMALL else view


def _visible(choice: Choice, here: Sequence[Prefix | None], site: str, device: torch.device) -> Tensor | None:
    """``(T, P)``: which tokens are a task's own, or how they count where some are weighed; None: all alike."""
    own = _own(choice, [p.length(site) if p else 0 for p in here], device)
    if not any(p and site in p.log_weights for p in here):
        return own
    longest = max(p.length(site) for p in here if p)
    numbers = torch.zeros(len(here), longest, device=device)
    if own is not None:
        numbers.masked_fill_(~own, -torch.inf)
    for row, prefix in zip(numbers, here, strict=True):
        if prefix and site in prefix.log_weights:
            row[: prefix.length(site)] = prefix.log_weights[site].float()
    return numbers


def _own(choice: Choice, lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """``(T, P)`` False where a task is padded, one tensor for all sites that are alike; None: none is."""
    if len(set(lengths)) == 1:
        return None
    key = tuple(lengths)
    if key not in choice.shared:
        choice.shared[key] = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    return choice.shared[key]


def _one_a_row(view: SitePrefix, choice: Choice) -> SitePrefix:
    """The same, gathered now instead of at each call: ``T`` becomes ``B``. What asks for the rows stays as it is."""
    rows = view.rows
    if rows is None or view.memory is not None or view.gated is not None or view.seen_by is not None:
        return view
    each = (view.keys, view.values, view.bias, view.gate, view.reading)
    keys, values, bias, gate, reading = (None if t is None else t[rows] for t in each)
    assert keys is not None and values is not None and choice.rows is not None
    visible = view.visible
    if visible is not None and visible.dtype == torch.bool:  # the same tensor at all sites: its mask is made once
        lengths = visible.sum(-1).tolist()
        visible = _own(choice, [lengths[r] for r in choice.rows], keys.device)
    elif visible is not None:
        visible = visible[rows]
    return SitePrefix(keys, values, None, visible, bias, gate, reading=reading)


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
