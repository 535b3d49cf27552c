"""Keys and values in few bits, and back.

A run of numbers x is written as whole numbers q of 8 or 4 bits, its start z and its step s, both in float16::

    q = round((x - z) / s),   x' = z + q s,   |x - x'| <= s / 2

with z = min x and s = (max x - z) / (2^bits - 1), which is the asymmetric quantisation of KIVI (arXiv 2402.02750,
section 3). s is at least |z| / 512, so that z, which has 11 bits, lies on the grid: what is packed, read and packed
again stays the same to the last bit. Numbers far from 0 in a narrow run are kept to 10 bits then.

The runs of all sites stand one after another in three tensors a kind, because the head of a safetensors file
takes about a hundred bytes for each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foreword.errors import ConfigError
from foreword.storage import Packing

_FINEST = 2.0**-15  # of a step, so that float16 has enough bits for it
_COARSEST = 2.0**-9  # of a step, by the start

Shape = tuple[int, int, int]  # heads, tokens, dimensions


def pack(states: Mapping[str, Tensor], kind: str, packing: Packing) -> dict[str, Tensor]:
    """What a file holds of all keys or values, by tensor name.

    Args:
        states: by site, ``(G, P, dim)``.
        kind: ``"keys"`` or ``"values"``.

    Raises:
        ConfigError: numbers that are not finite, or too large for the scales.
    """
    states = {name: tensor.detach().cpu() for name, tensor in states.items()}
    if packing.bits is None:
        return {n: t.contiguous() for name, own in states.items() for n, t in _whole(f"{name}.{kind}", own, packing)}
    parts = [encode(torch.empty(0, 0, 0), packing)]  # so that no site at all has dtypes too
    for name, own in states.items():
        parts.append(encode(own, packing))
        if not all(part.isfinite().all() for part in parts[-1]):
            worst = f"numbers up to {own.abs().max():.3g}" if own.isfinite().all() else "numbers that are not finite"
            raise ConfigError(
                f"{name}: the {kind} have {worst}, and the scales of int{packing.bits} end at 65504; store them as "
                'they are: storage="plain"'
            )
    codes, starts, steps = (torch.cat([part[i] for part in parts]) for i in range(3))
    return {
        f"packed.{kind}.codes": _pairs(codes) if packing.bits == 4 else codes,
        f"packed.{kind}.starts": starts,
        f"packed.{kind}.steps": steps,
    }


def unpack(tensors: dict[str, Tensor], kind: str, packing: Packing, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The opposite of :func:`pack`: ``<site>.<kind>`` in float32 for those packed in bits, else in their dtype.

    Args:
        tensors: of the file; what is used of them is taken out.
        shapes: by site.

    Raises:
        KeyError: a tensor is missing.
        ValueError: one is of another dtype or size, or both forms are there.
    """
    if packing.bits is None:
        return _multiplied(tensors, kind, shapes)
    if both := next((name for name in shapes if f"{name}.{kind}" in tensors), None):
        raise ValueError(f"{both}.{kind} is there twice, as it is and packed")
    codes, starts, steps = (tensors.pop(f"packed.{kind}.{part}") for part in ("codes", "starts", "steps"))
    numbers = {name: _count(shape) for name, shape in shapes.items()}
    runs = {name: _runs(shape, packing) for name, shape in shapes.items()}
    count, wanted = sum(numbers.values()), sum(r * n for r, n in runs.values())
    stored = -(-count // 2) if packing.bits == 4 else count
    for what, tensor, dtype, size in (
        ("codes", codes, torch.uint8, stored),
        ("starts", starts, torch.float16, wanted),
        ("steps", steps, torch.float16, wanted),
    ):
        if tensor.dtype != dtype or tensor.shape != (size,):
            raise ValueError(
                f"packed.{kind}.{what} is {tensor.dtype} {tuple(tensor.shape)}, and the sites' shapes ask for {dtype} "
                f"({size},)"
            )
    if not bool((steps > 0).all()):
        raise ValueError(f"packed.{kind}.steps has a step that is not above 0")
    if packing.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).flatten()[:count]
    of_codes = codes.split(list(numbers.values()))
    of_runs = [each.split([r * n for r, n in runs.values()]) for each in (starts, steps)]
    return {
        f"{name}.{kind}": decode(own, start, step, shape, packing)
        for (name, shape), own, start, step in zip(shapes.items(), of_codes, *of_runs, strict=True)
    }


def encode(states: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """``(G, P, dim)`` -> codes, one byte each in the order of the runs; starts and steps, ``(runs,)`` float16."""
    assert packing.bits is not None
    if not states.numel():
        none = torch.empty(0, dtype=torch.float16)
        return torch.empty(0, dtype=torch.uint8), none, none
    rows = _rows(states.float(), packing.by)  # (rows, n)
    index = _padding(rows.shape[1], packing.group)
    groups = rows[:, index.flatten()].unflatten(1, index.shape)  # (rows, runs in a row, numbers in a run)
    most = 2**packing.bits - 1
    starts = groups.amin(-1).half()
    width = (groups.amax(-1) - starts.float()) / most
    steps = torch.maximum(width.half().float(), starts.float().abs() * _COARSEST).clamp(min=_FINEST).half()
    codes = ((groups - starts.float()[..., None]) / steps.float()[..., None]).round().clamp(0, most).to(torch.uint8)
    return codes.flatten(1)[:, : rows.shape[1]].flatten(), starts.flatten(), steps.flatten()


def decode(codes: Tensor, starts: Tensor, steps: Tensor, shape: Shape, packing: Packing) -> Tensor:
    """The opposite of :func:`encode`, in float32."""
    heads, length, dim = shape
    if not codes.numel():
        return torch.empty(shape)
    rows, per_row = _runs(shape, packing)
    width = codes.numel() // rows
    index = _padding(width, packing.group)
    groups = codes.view(rows, width)[:, index.flatten()].unflatten(1, index.shape).float()
    numbers = starts.float().view(rows, per_row, 1) + groups * steps.float().view(rows, per_row, 1)
    flat = numbers.flatten(1)[:, :width]
    if packing.by == "token":
        return flat.reshape(heads, length, dim).contiguous()
    return flat.reshape(heads, dim, length).transpose(1, 2).contiguous()


def factors(states: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """``(G, P, dim)`` -> the best two of a rank (Eckart and Young 1936), ``(P, r)`` and ``(r, G * dim)``.

    None where they would take no fewer numbers. A token's heads stand side by side: one SVD for all of them.
    """
    heads, length, dim = states.shape
    rank = min(rank, length, heads * dim)
    if not rank or rank * (length + heads * dim) >= states.numel():
        return None
    left, size, right = torch.linalg.svd(states.transpose(0, 1).flatten(1).double(), full_matrices=False)
    root = size[:rank].sqrt()
    return (left[:, :rank] * root).to(states.dtype), (root[:, None] * right[:rank]).to(states.dtype)


def _whole(name: str, states: Tensor, packing: Packing) -> list[tuple[str, Tensor]]:
    pair = factors(states, packing.rank) if packing.rank is not None else None
    if pair is None:
        return [(name, states.clone())]
    return [(f"{name}.left", pair[0]), (f"{name}.right", pair[1])]


def _multiplied(tensors: dict[str, Tensor], kind: str, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Sites that are stored as two factors."""
    found = {}
    for name, (heads, length, dim) in shapes.items():
        whole = f"{name}.{kind}"
        if f"{whole}.left" not in tensors and f"{whole}.right" not in tensors:
            continue
        if whole in tensors:
            raise ValueError(f"{whole} is there twice, as it is and as factors")
        left, right = tensors.pop(f"{whole}.left"), tensors.pop(f"{whole}.right")
        fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0] > 0
        if not fits or (left.shape[0], right.shape[1]) != (length, heads * dim) or left.dtype != right.dtype:
            raise ValueError(
                f"{whole} is stored as {left.dtype} {tuple(left.shape)} times {right.dtype} {tuple(right.shape)}, and "
                f"the site has {heads} heads, {length} tokens, {dim} dimensions"
            )
        if not left.is_floating_point():
            raise ValueError(f"the factors of {whole} are {left.dtype}, expected a floating-point dtype")
        product = (left.float() @ right.float()).to(left.dtype)
        found[whole] = product.unflatten(1, (heads, dim)).transpose(0, 1).contiguous()
    return found


def _rows(states: Tensor, by: str) -> Tensor:
    """A row for each dimension of a head, or for each token of a head."""
    return states.flatten(0, 1) if by == "token" else states.transpose(1, 2).flatten(0, 1)


def _runs(shape: Shape, packing: Packing) -> tuple[int, int]:
    """How many rows there are, and how many runs in each."""
    heads, length, dim = shape
    if not _count(shape):
        return 0, 0
    rows, width = (heads * length, dim) if packing.by == "token" else (heads * dim, length)
    return rows, -(-width // packing.group)


def _padding(width: int, group: int) -> Tensor:
    """Indices of a row's numbers by run, ``(runs, numbers)``; runs of like length, the last filled with its last."""
    runs = -(-width // group)
    size = -(-width // runs)
    return torch.arange(runs * size).clamp(max=width - 1).view(runs, size)


def _pairs(codes: Tensor) -> Tensor:
    """Two codes of 4 bits a byte, the first in the low half."""
    even = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return even[:, 0] | (even[:, 1] << 4)


def _count(shape: Sequence[int]) -> int:
    return math.prod(shape)
