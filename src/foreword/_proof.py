"""Proof by running: with slots in place and nothing to add, a model gives what it gave before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreword.errors import UnsupportedModelError

_NOISE = 8.0  # times the difference of two plain runs that is still taken for the same


def check_route(model: nn.Module, routed: Callable[[], Any], plain: Callable[[], Any]) -> None:
    """Compare a pass that goes through slots which add nothing with a plain one.

    Args:
        routed, plain: make one pass each, of the same inputs, and return the model's output.

    Raises:
        UnsupportedModelError: the outputs differ by more than two plain passes do.
    """
    got = _seeded(routed)
    want = _seeded(plain)
    off = largest_difference(got, want)
    if off == 0:
        return
    noise = largest_difference(_seeded(plain), want)  # kernels that add up in another order each time
    if not off <= _NOISE * noise:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives another output when its attention calls pass through foreword and nothing "
            f"is added to them: off by {off:.2g} of the output's size, where two plain passes are off by {noise:.2g}. "
            "Its file depends on which attention function it is given; try another attn_implementation"
        )


def largest_difference(a: Any, b: Any) -> float:
    """The largest difference of two outputs, relative to the size of the tensor it is in; inf where shapes differ."""
    ours, theirs = list(tensors(a)), list(tensors(b))
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    return max((_off(x, y) for x, y in zip(ours, theirs, strict=True)), default=0.0)


def _off(a: Tensor, b: Tensor) -> float:
    if a.is_meta or a.numel() == 0 or torch.equal(a, b):
        return 0.0
    if not a.is_floating_point():
        return float((a != b).any())
    a, b = a.detach().double(), b.detach().double()
    odd = ~(a.isfinite() & b.isfinite())  # masked scores: the same infinities, or not
    if bool((odd & ~((a == b) | (a.isnan() & b.isnan()))).any()):
        return float("inf")
    a, b = a.masked_fill(odd, 0.0), b.masked_fill(odd, 0.0)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of an output, in its order; caches, which hold what was read, are left out."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from tensors(value)


def _seeded(run: Callable[[], Any]) -> Any:
    """A run whose random numbers, if it draws any, are the same each time."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        torch.manual_seed(0)
        return run()
