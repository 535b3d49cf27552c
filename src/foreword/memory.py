"""PrefixMemory-Tuning (arXiv 2506.13674, also Prefix-Tuning+): a prefix moved out of the softmax.

A prefix's share of the attention competes with the text's: the longer the text, the less of the prefix is left. A
memory is added instead, at every query head::

    o = softmax(q K^T * scale) V + phi(q)^T M,        M (key_dim, value_dim), phi = ELU or GELU

M starts at zero, so training starts at the base model exactly. It may be a product ``U V`` of rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foreword.errors import AttachError, ConfigError
from foreword.positions import Rotation
from foreword.sites import Site

Activation = Literal["elu", "gelu"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"elu": nn.functional.elu, "gelu": nn.functional.gelu}


@dataclass(frozen=True, slots=True)
class Recall:
    """How a memory is read: phi, and queries as the model uses them (``rotated``) or before RoPE (``plain``)."""

    activation: Activation = "elu"
    queries: Literal["rotated", "plain"] = "rotated"

    def __post_init__(self) -> None:
        for name, allowed in (("activation", tuple(_ACTIVATIONS)), ("queries", ("rotated", "plain"))):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(
                    f"a memory's {name} is {value!r}; expected one of {', '.join(map(repr, allowed))} (or a newer "
                    "version of foreword that knows it)"
                )


@dataclass(frozen=True, slots=True)
class SiteMemory:
    """What one attention site reads of a memory.

    Shapes: T tasks, H query heads, D key_dim, E value_dim.
    """

    matrix: Tensor  # (T, H, D, E), or (T, H, D, r) with `up`
    up: Tensor | None = None  # (T, H, r, E)
    activation: Activation = "elu"
    rotation: Rotation | None = None  # if given, queries are turned back to position 0 first

    def recall(self, query: Tensor, rows: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor:
        """``phi(q)^T M``: ``(B, S, H, E)`` for queries ``(B, H, S, D)``.

        Args:
            rows: the task of each row of the batch, as in ``SitePrefix``.
        """
        if self.rotation is not None:
            query = _turned_back(query, self.rotation, kwargs.get("position_ids"))
        factors = [m.to(query) for m in (self.matrix, self.up) if m is not None]
        activate = _ACTIVATIONS[self.activation]
        if rows is not None and len(factors[0]) > 1:
            task = rows.to(query.device).repeat_interleave(len(query) // len(rows))
            out = activate(query)
            for matrices in factors:
                out = out @ matrices[task]
            return out.transpose(1, 2)
        batch, heads, length, dim = query.shape
        if batch * length > dim:  # many queries: one product by U V, made once, costs less than two
            factors = [matrices[0] for matrices in factors]
            whole = factors[0] @ factors[1] if self.up is not None else factors[0]
            return torch.einsum("bhsd,hde->bshe", activate(query), whole)
        # A step of generation: a product a head, on a copy that the activation may write into.
        out = query.transpose(0, 1).clone(memory_format=torch.contiguous_format).view(heads, batch * length, dim)
        out = nn.functional.elu(out, inplace=True) if self.activation == "elu" else activate(out)
        for matrices in factors:
            out = torch.bmm(out, matrices[0])
        return out.view(heads, batch, length, -1).permute(1, 2, 0, 3)


def _turned_back(query: Tensor, rotation: Rotation, positions: Any) -> Tensor:
    """Queries before their rotation, ``R(-p) q`` for the position p of each."""
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        raise AttachError(
            'a memory with queries="plain" must know the positions, and this model does not hand position_ids to its '
            'attention; use queries="rotated" (as the model uses them)'
        )
    return rotation(query, -positions[:, None])


class Memory(nn.Module):
    """The trainable matrices of some sites: ``sum of heads * key_dim * value_dim`` numbers.

    With a rank it is ``sum of heads * rank * (key_dim + value_dim)``: U is random and V zero, so that M starts at zero
    and still learns.
    """

    def __init__(self, sites: Sequence[Site], *, rank: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.names = [s.name for s in sites]
        self.factored = list(self.names) if rank is not None else []  # the sites that `up` is for, in its order
        self.matrix, self.up = nn.ParameterList(), nn.ParameterList()
        generator = torch.Generator().manual_seed(seed)
        for site in sites:
            if rank is None:
                self.matrix.append(nn.Parameter(torch.zeros(site.heads, site.key_dim, site.value_dim)))
                continue
            down = torch.randn(site.heads, site.key_dim, rank, generator=generator) * site.key_dim**-0.5
            self.matrix.append(nn.Parameter(down))
            self.up.append(nn.Parameter(torch.zeros(site.heads, rank, site.value_dim)))

    @classmethod
    def of(cls, matrices: Mapping[str, Tensor], ups: Mapping[str, Tensor], *, trainable: bool) -> Memory:
        """A memory that begins at given numbers, by site.

        Args:
            matrices: ``(heads, key_dim, value_dim)``, or ``(heads, key_dim, rank)`` where there is an ``up``.
            ups: ``(heads, rank, value_dim)``, of those that are a product.
        """
        memory = cls([])
        memory.names, memory.factored = list(matrices), list(ups)
        memory.matrix, memory.up = (
            nn.ParameterList(nn.Parameter(t.clone(), requires_grad=trainable) for t in tensors.values())
            for tensors in (matrices, ups)
        )
        return memory

    def factors(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """By site: the matrix and None, or the two factors."""
        ups = dict(zip(self.factored, self.up, strict=True))
        return {n: (m, ups.get(n)) for n, m in zip(self.names, self.matrix, strict=True)}

    @torch.no_grad()
    def baked(self, strength: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The matrices and the ups by site, as :meth:`of` takes them; ``strength`` becomes part of the matrices."""
        matrices = {n: m.detach() * strength for n, m in zip(self.names, self.matrix, strict=True)}
        return matrices, {n: up.detach().clone() for n, up in zip(self.factored, self.up, strict=True)}
