"""What is trained and becomes a prefix: the numbers themselves, an MLP that makes them, or a low-rank change.

An encoder is a module whose ``forward()`` gives every site's keys and values, once a forward pass of the model and
not once a row. ``bake`` keeps what it gives and throws the encoder away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreword.config import PrefixConfig
from foreword.errors import ConfigError
from foreword.sites import Site

States = dict[str, tuple[Tensor, Tensor]]  # by site: keys (G, P, key_dim), values (G, P, value_dim)


class PrefixEncoder(nn.Module):
    """Base of the encoders: subclasses write ``encode``; the frozen first token and dropout are here.

    Args:
        start: keys and values to start from, by site name.
        freeze_first: whether the first token of each site stays as it starts.
        dropout: probability of dropping a number of the prefix in training.
    """

    def __init__(self, start: Mapping[str, tuple[Tensor, Tensor]], *, freeze_first: bool, dropout: float) -> None:
        super().__init__()
        self.names = list(start)
        self.freeze_first = freeze_first
        self.dropout = dropout
        if freeze_first:
            for i, (keys, values) in enumerate(start.values()):
                self.register_buffer(f"first_keys_{i}", keys[:, :1].clone())
                self.register_buffer(f"first_values_{i}", values[:, :1].clone())

    def encode(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each site of ``names``, without the frozen first token."""
        raise NotImplementedError

    def forward(self) -> States:
        states = self.encode()
        if self.dropout and self.training:
            drop = nn.functional.dropout
            states = [(drop(k, self.dropout), drop(v, self.dropout)) for k, v in states]
        if self.freeze_first:
            states = [
                (self._with_first("keys", i, k), self._with_first("values", i, v)) for i, (k, v) in enumerate(states)
            ]
        return dict(zip(self.names, states, strict=True))

    def _with_first(self, kind: str, i: int, rest: Tensor) -> Tensor:
        return torch.cat([getattr(self, f"first_{kind}_{i}"), rest], dim=1)

    def _trained(self, start: Mapping[str, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The part of the start that is trained, as copies."""
        first = 1 if self.freeze_first else 0
        return [(k[:, first:].clone(), v[:, first:].clone()) for k, v in start.values()]


class Frozen(PrefixEncoder):
    """A baked prefix: buffers that follow the model's device and dtype and stay out of its state dict."""

    def __init__(self, states: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__(states, freeze_first=False, dropout=0.0)
        for i, (keys, values) in enumerate(states.values()):
            self.register_buffer(f"keys_{i}", keys.detach(), persistent=False)
            self.register_buffer(f"values_{i}", values.detach(), persistent=False)

    def encode(self) -> list[tuple[Tensor, Tensor]]:
        return [(getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")) for i in range(len(self.names))]


class Direct(PrefixEncoder):
    """The keys and values themselves: ``sum over sites of length * kv_heads * (key_dim + value_dim)`` numbers."""

    def __init__(
        self, start: Mapping[str, tuple[Tensor, Tensor]], *, freeze_first: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__(start, freeze_first=freeze_first, dropout=dropout)
        trained = self._trained(start)
        self.keys = nn.ParameterList([k for k, _ in trained])
        self.values = nn.ParameterList([v for _, v in trained])

    def encode(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.keys, self.values, strict=True))


class _Produced(PrefixEncoder):
    """Encoders that make one long row a token, cut into the sites' keys and values, and may add it to a start."""

    def __init__(
        self,
        start: Mapping[str, tuple[Tensor, Tensor]],
        *,
        freeze_first: bool,
        dropout: float,
        residual: bool,
    ) -> None:
        super().__init__(start, freeze_first=freeze_first, dropout=dropout)
        trained = self._trained(start)
        self.residual = residual
        self.shapes = [(k.shape, v.shape) for k, v in trained]
        self.length = max(k.shape[1] for k, _ in trained)
        if residual:
            for i, (keys, values) in enumerate(trained):
                self.register_buffer(f"start_keys_{i}", keys)
                self.register_buffer(f"start_values_{i}", values)

    def widths(self, indices: Sequence[int]) -> list[int]:
        """How many numbers a token has at each of the sites."""
        return [self.shapes[i][j][0] * self.shapes[i][j][2] for i in indices for j in (0, 1)]

    def cut(self, rows: Tensor, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """``(length, sum of widths)`` -> keys and values of each site, ``(G, P, dim)``."""
        parts = rows.split(self.widths(indices), dim=1)
        states = []
        for n, i in enumerate(indices):
            pair = []
            for part, (heads, length, dim) in zip(parts[2 * n : 2 * n + 2], self.shapes[i], strict=True):
                pair.append(part[:length].unflatten(1, (heads, dim)).transpose(0, 1))
            keys, values = pair
            if self.residual:
                keys = keys + getattr(self, f"start_keys_{i}")
                values = values + getattr(self, f"start_values_{i}")
            states.append((keys, values))
        return states


class MLP(_Produced):
    """An MLP of 1 to 3 layers with tanh between, over one trained vector a token.

    With two layers and a random start this is the paper's ``P[i] = MLP(P'[i])`` (Li & Liang 2021, section 4.3).
    With another start its last layer begins at zero and adds to it, so training begins at that start exactly.

    Args:
        groups: indices of the sites that share an MLP.
    """

    def __init__(
        self,
        start: Mapping[str, tuple[Tensor, Tensor]],
        groups: Sequence[Sequence[int]],
        *,
        depth: int = 2,
        hidden: int = 512,
        residual: bool = True,
        freeze_first: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(start, freeze_first=freeze_first, dropout=dropout, residual=residual)
        self.groups = [list(g) for g in groups]
        self.embeddings = nn.ParameterList()
        self.nets = nn.ModuleList()
        for group in self.groups:
            length = max(self.shapes[i][0][1] for i in group)
            self.embeddings.append(nn.Parameter(torch.randn(length, hidden)))
            layers: list[nn.Module] = []
            for _ in range(depth - 1):
                layers += [nn.Linear(hidden, hidden), nn.Tanh()]
            last = nn.Linear(hidden, sum(self.widths(group)))
            if residual:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            self.nets.append(nn.Sequential(*layers, last))

    def encode(self) -> list[tuple[Tensor, Tensor]]:
        states: dict[int, tuple[Tensor, Tensor]] = {}
        for group, embedding, net in zip(self.groups, self.embeddings, self.nets, strict=True):
            states.update(zip(group, self.cut(net(embedding), group), strict=True))
        return [states[i] for i in range(len(self.names))]


class LowRank(_Produced):
    """A change of rank k to the start: ``start + P' W_up``, P' ``(length, k)``, W_up ``(k, all sites)`` from 0."""

    def __init__(
        self,
        start: Mapping[str, tuple[Tensor, Tensor]],
        *,
        rank: int = 8,
        freeze_first: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(start, freeze_first=freeze_first, dropout=dropout, residual=True)
        self.tokens = nn.Parameter(torch.randn(self.length, rank))
        self.up = nn.Parameter(torch.zeros(rank, sum(self.widths(range(len(self.names))))))

    def encode(self) -> list[tuple[Tensor, Tensor]]:
        return self.cut(self.tokens @ self.up, range(len(self.names)))


def make_encoder(
    config: PrefixConfig, start: Mapping[str, tuple[Tensor, Tensor]], sites: Sequence[Site]
) -> PrefixEncoder:
    """The encoder that a configuration asks for, beginning at ``start``.

    Raises:
        ConfigError: the first token is to be frozen and there is no other.
    """
    shortest = min(k.shape[1] for k, _ in start.values())
    if config.freeze_first and shortest < 2:
        raise ConfigError(f"freeze_first with a site of {shortest} token leaves nothing to train; use length 2 or more")
    shared: dict[str, Any] = {"freeze_first": config.freeze_first, "dropout": config.dropout}
    if config.reparam == "direct":
        return Direct(start, **shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.reparam == "low-rank":
            return LowRank(start, rank=config.rank, **shared)
        kinds = {s.name: s.kind for s in sites}
        order = list(start)
        groups = [list(range(len(order)))]
        if config.per_kind:
            present = sorted({kinds[n] for n in order})
            groups = [[i for i, n in enumerate(order) if kinds[n] == kind] for kind in present]
        residual = config.init != "random"
        return MLP(start, groups, depth=config.depth, hidden=config.hidden, residual=residual, **shared)
