"""What a prefix becomes in vLLM's cache: rows of keys and values by layer, and which prefixes can become that.

vLLM's cache knows keys and values at positions, and nothing else: every token of every layer attends to all of them,
text starts after them. So the keys move to the positions 0 … P-1 (their text then starts at P), and what needs more
than that is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foreword.cacheable import check_cacheable, for_cache, layer_number
from foreword.errors import MismatchError
from foreword.prefix import Prefix


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model as vLLM serves it.

    Attributes:
        layers: attention layers in all, over all stages of a pipeline.
        kv_heads: of a layer in all, over all tensor-parallel workers.
        key_dim: of a head's keys and values.
    """

    layers: int
    kv_heads: int
    key_dim: int


@dataclass(frozen=True, eq=False)
class Rows:
    """A prefix by layer number.

    Attributes:
        keys: ``(length, kv_heads, key_dim)`` for text that starts at ``length``.
        values: ``(length, kv_heads, value_dim)``.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    length: int

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for group in (self.keys, self.values) for t in group.values())

    def part(self, layers: Sequence[int], heads: slice, dtype: torch.dtype) -> Rows:
        """What one worker holds: the layers of its stage, the heads of its rank, in the model's dtype.

        Raises:
            MismatchError: the prefix has nothing for a layer.
        """
        if lacking := sorted(set(layers) - set(self.keys)):
            raise MismatchError(f"the prefix has nothing for layer {lacking[0]}; its layers: {_few(self.keys)}")
        keys, values = (
            {n: group[n][:, heads].to(dtype).contiguous() for n in layers} for group in (self.keys, self.values)
        )
        return Rows(keys, values, self.length)


def rows_of(prefix: Prefix) -> Rows:
    """The rows of all layers and heads, in float32.

    Raises:
        MismatchError: see :func:`check_servable`.
    """
    length = check_servable(prefix)
    moved = for_cache(prefix, length)
    keys, values = (
        {layer_number(n): t.transpose(0, 1).contiguous() for n, t in group.items()}
        for group in (moved.keys, moved.values)
    )
    return Rows(keys, values, length)


def check_servable(prefix: Prefix) -> int:
    """The length of a prefix that keys and values in vLLM's cache can stand for.

    Raises:
        MismatchError: it is another kind of prefix; the message says what it has that vLLM doesn't.
    """
    return check_cacheable(prefix, "vLLM", "Serve it with `foreword serve`")


def check_fits(prefix: Prefix, shape: Shape) -> None:
    """Make sure that a prefix has the layers and heads of a model.

    Raises:
        MismatchError: says what differs.
    """
    numbers = {layer_number(s.name) for s in prefix.sites}
    if numbers != set(range(shape.layers)):
        raise MismatchError(
            f"the prefix has keys for {len(numbers)} layers ({_few(numbers)}), the model {shape.layers}; vLLM's cache "
            "has one length for all of them"
        )
    for site in prefix.sites:
        if (site.kv_heads, site.key_dim) != (shape.kv_heads, shape.key_dim):
            raise MismatchError(
                f"{site.name} has {site.kv_heads} key/value heads of {site.key_dim} dimensions, the model "
                f"{shape.kv_heads} of {shape.key_dim}"
            )


def heads_of(total: int, rank: int, ranks: int) -> slice:
    """The key/value heads that one of several tensor-parallel workers holds.

    Each holds ``total / ranks``; where there are fewer heads than workers, each head stands on ``ranks / total`` of
    them, neighbours. (``vllm.model_executor.layers.linear.QKVParallelLinear`` lays them out like that.)

    Raises:
        MismatchError: they can't be dealt out evenly.
    """
    if not 0 <= rank < ranks or max(total, ranks) % min(total, ranks):
        raise MismatchError(f"{total} key/value heads can't be dealt out to {ranks} workers (rank {rank})")
    if total >= ranks:
        each = total // ranks
        return slice(rank * each, (rank + 1) * each)
    head = rank // (ranks // total)
    return slice(head, head + 1)


def _few(numbers: object) -> str:
    found = sorted(numbers)  # type: ignore[call-overload]
    return ", ".join(map(str, found[:6])) + (f", … {found[-1]}" if len(found) > 6 else "")
