"""What is trained and becomes a prefix: the numbers themselves, an MLP that makes them, or a low-rank change.

An encoder is a module whose ``forward()`` gives every site's keys and values, once a forward pass of the model and
not once a row. ``bake`` keeps what it gives and throws the encoder away.

Some are *given* something first: which tasks a batch is of (each has its own prefix, over what they share), or a
condition vector a row, from which that row's prefix is made. Then a dimension stands in front of all they give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foreword._kernels import dense
from foreword.config import PrefixConfig
from foreword.errors import ConfigError
from foreword.sites import Site

# By site: keys (G, P, key_dim), values (G, P, value_dim); with a dimension in front for tasks or rows.
States = dict[str, tuple[Tensor, Tensor]]
Start = Mapping[str, tuple[Tensor, Tensor]]


class PrefixEncoder(nn.Module):
    """Base of the encoders: subclasses write ``encode``; the frozen first token and dropout are here.

    Args:
        start: keys and values to start from, by site name; ``(T, G, P, dim)`` for T tasks.
        freeze_first: whether the first token of each site stays as it starts.
        dropout: probability of dropping a number of the prefix in training.
        common: how many of the first tokens all tasks share; they start alike.

    Attributes:
        common: how many of the trained tokens are shared: those of the argument, without the frozen first.
        asks: what ``forward`` must be given: ``"task"``, numbers ``(T',)`` of the tasks wanted, which then stand in
            front of all shapes; ``"condition"``, ``(R, C)`` vectors, likewise; None: nothing.
        active: how many tokens there are yet, of a prefix that grows; None: all.
        opening: weight of the newest of them while they come in: ``(how many, from 0 to 1)``.
    """

    asks: Literal["task", "condition"] | None = None
    condition: int | None = None  # numbers in a condition vector

    def __init__(self, start: Start, *, freeze_first: bool, dropout: float, common: int = 0) -> None:
        super().__init__()
        self.common = max(0, common - freeze_first)
        self.names = list(start)
        self.longest = max((k.shape[-2] for k, _ in start.values()), default=0)
        self.active: int | None = None
        self.opening: tuple[int, float] | None = None
        self.freeze_first = freeze_first
        self.dropout = dropout
        if any(v.dim() == 4 for _, v in start.values()):
            self.asks = "task"
        if freeze_first:
            for i, (keys, values) in enumerate(start.values()):
                self.register_buffer(f"first_keys_{i}", keys[..., :1, :].clone())
                self.register_buffer(f"first_values_{i}", values[..., :1, :].clone())

    def encode(self, given: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each site of ``names``, without the frozen first token."""
        raise NotImplementedError

    def forward(self, given: Tensor | None = None) -> States:
        states = self.encode(given)
        if self.dropout and self.training:
            drop = nn.functional.dropout
            states = [(drop(k, self.dropout), drop(v, self.dropout)) for k, v in states]
        if self.freeze_first:
            states = [
                (self._with_first(f"first_keys_{i}", k, given), self._with_first(f"first_values_{i}", v, given))
                for i, (k, v) in enumerate(states)
            ]
        if self.active is not None:
            states = [(k[..., : self.active, :], v[..., : self.active, :]) for k, v in states]
        return dict(zip(self.names, states, strict=True))

    def log_weights(self, keys: Tensor) -> Tensor | None:
        """Of a site's tokens, ``(1|T, P)`` for keys ``([T,] G, P, dim)``, while some come in; None: all count fully."""
        if self.opening is None or self.active is None:
            return None
        count, weight = self.opening
        each = torch.ones(self.active, device=keys.device)
        each[self.active - count :] = weight
        return each[: keys.shape[-2]].log().expand(len(keys) if keys.dim() == 4 else 1, -1)

    def by_token(self) -> list[tuple[int, nn.Parameter]]:
        """The parameters that have a row a token, in the last dimension but one, and which token their first is."""
        return []

    def get_extra_state(self) -> Tensor:
        """How many tokens there are, for a checkpoint; 0: all."""
        return torch.tensor([self.active or 0])

    def set_extra_state(self, state: Tensor) -> None:
        self.active = int(state[0]) or None

    def of_tasks(self, tensor: Tensor, given: Tensor | None) -> Tensor:
        """``(T, ...)`` -> the tasks given; anything else is for all of them."""
        return tensor[given] if self.asks == "task" else tensor

    def own_and_common(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(T, ..., P, dim)`` -> the tasks' own tokens, and those for all of them, ``(..., common, dim)``."""
        if not self.common:
            return tensor, None
        return tensor[..., self.common :, :].contiguous(), tensor[0, ..., : self.common, :].contiguous()

    def behind(self, common: nn.ParameterList, i: int, own: Tensor) -> Tensor:
        """``(..., P, dim)``: own tokens after the i-th common ones, if there are any."""
        if not self.common:
            return own
        return torch.cat([common[i].expand(*own.shape[:-2], *common[i].shape[-2:]), own], dim=-2)

    def _rows(self, own: Iterable[nn.Parameter], common: Iterable[nn.Parameter]) -> list[tuple[int, nn.Parameter]]:
        first = int(self.freeze_first)
        return [*((first + self.common, p) for p in own), *((first, p) for p in common)]

    def _with_first(self, buffer: str, rest: Tensor, given: Tensor | None) -> Tensor:
        first = self.of_tasks(getattr(self, buffer), given)
        return torch.cat([first.expand(*rest.shape[:-2], -1, -1), rest], dim=-2)

    def _trained(self, start: Start) -> list[tuple[Tensor, Tensor]]:
        """The part of the start that is trained, as copies."""
        first = 1 if self.freeze_first else 0
        return [(k[..., first:, :].clone(), v[..., first:, :].clone()) for k, v in start.values()]


class Frozen(PrefixEncoder):
    """A baked prefix: buffers, rows side by side, that follow the model's device and stay out of its state dict."""

    get_extra_state = nn.Module.get_extra_state  # out of it as well
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, states: Start) -> None:
        super().__init__(states, freeze_first=False, dropout=0.0)
        for i, (keys, values) in enumerate(states.values()):
            self.register_buffer(f"keys_{i}", dense(keys.detach()), persistent=False)
            self.register_buffer(f"values_{i}", dense(values.detach()), persistent=False)

    def encode(self, given: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        return [(getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")) for i in range(len(self.names))]


class Direct(PrefixEncoder):
    """The keys and values themselves: ``sum over sites of length * kv_heads * (key_dim + value_dim)`` numbers.

    With tasks, each has its own; ``share_keys`` gives all the keys of the first, so that they differ in values only.
    """

    def __init__(
        self,
        start: Start,
        *,
        freeze_first: bool = False,
        dropout: float = 0.0,
        share_keys: bool = False,
        common: int = 0,
    ) -> None:
        if share_keys:
            start = {n: (k[:1], v) for n, (k, v) in start.items()}
        super().__init__(start, freeze_first=freeze_first, dropout=dropout, common=common)
        self.share_keys = share_keys
        self.keys, self.values = nn.ParameterList(), nn.ParameterList()
        self.common_keys, self.common_values = nn.ParameterList(), nn.ParameterList()
        for pair in self._trained(start):
            parts = ((self.keys, self.common_keys), (self.values, self.common_values))
            for states, (own_part, common_part) in zip(pair, parts, strict=True):
                own, shared = self.own_and_common(states)
                own_part.append(nn.Parameter(own))
                if shared is not None:
                    common_part.append(nn.Parameter(shared))

    def by_token(self) -> list[tuple[int, nn.Parameter]]:
        return self._rows([*self.keys, *self.values], [*self.common_keys, *self.common_values])

    def by_site(self) -> list[list[nn.Parameter]]:
        """The parameters of each site of ``names``."""
        lists = (self.keys, self.values, self.common_keys, self.common_values)
        return [[part[i] for part in lists if len(part)] for i in range(len(self.names))]

    def encode(self, given: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        states = []
        for i, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            own_values = self.of_tasks(values, given)
            own_keys = keys.expand(len(own_values), -1, -1, -1) if self.share_keys else self.of_tasks(keys, given)
            states.append((
                self.behind(self.common_keys, i, own_keys), self.behind(self.common_values, i, own_values)
            ))  # fmt: skip
        return states

    def _with_first(self, buffer: str, rest: Tensor, given: Tensor | None) -> Tensor:
        if self.share_keys and buffer.startswith("first_keys"):
            given = torch.zeros_like(given) if given is not None else None
        return super()._with_first(buffer, rest, given)


class _Produced(PrefixEncoder):
    """Encoders that make one long row a token, cut into the sites' keys and values, and may add it to a start."""

    def __init__(self, start: Start, *, freeze_first: bool, dropout: float, residual: bool, common: int) -> None:
        super().__init__(start, freeze_first=freeze_first, dropout=dropout, common=common)
        trained = self._trained(start)
        self.residual = residual
        self.tasks = trained[0][0].shape[:-3]  # (T,), or () without tasks
        self.shapes = [(k.shape[-3:], v.shape[-3:]) for k, v in trained]
        self.length = max(k.shape[-2] for k, _ in trained)
        if residual:
            for i, (keys, values) in enumerate(trained):
                self.register_buffer(f"start_keys_{i}", keys)
                self.register_buffer(f"start_values_{i}", values)

    def widths(self, indices: Sequence[int]) -> list[int]:
        """How many numbers a token has at each of the sites."""
        return [self.shapes[i][j][0] * self.shapes[i][j][2] for i in indices for j in (0, 1)]

    def cut(self, rows: Tensor, indices: Sequence[int], given: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """``(..., length, sum of widths)`` -> keys and values of each site, ``(..., G, P, dim)``."""
        parts = rows.split(self.widths(indices), dim=-1)
        states = []
        for n, i in enumerate(indices):
            pair = []
            for part, (heads, length, dim) in zip(parts[2 * n : 2 * n + 2], self.shapes[i], strict=True):
                pair.append(part[..., :length, :].unflatten(-1, (heads, dim)).transpose(-3, -2))
            keys, values = pair
            if self.residual:
                keys = keys + self.of_tasks(getattr(self, f"start_keys_{i}"), given)
                values = values + self.of_tasks(getattr(self, f"start_values_{i}"), given)
            states.append((keys, values))
        return states


class MLP(_Produced):
    """An MLP of 1 to 3 layers with tanh between, over one trained vector a token.

    With two layers and a random start this is the paper's ``P[i] = MLP(P'[i])`` (Li & Liang 2021, section 4.3).
    With another start its last layer begins at zero and adds to it, so training begins at that start exactly.
    Tasks have vectors of their own and one MLP.

    Args:
        groups: indices of the sites that share an MLP.
        share_layers: whether the MLP makes one site's keys and values, told which by a trained vector a site:
            ``P[l, i] = MLP(P'[i] + L[l])``, instead of all sites' at once.
        condition: numbers in a condition vector c; then ``P[i] = MLP(P'[i] + W c)``.
        orthogonal: whether layers start orthogonal, with biases of zero.
    """

    def __init__(
        self,
        start: Start,
        groups: Sequence[Sequence[int]],
        *,
        depth: int = 2,
        hidden: int = 512,
        residual: bool = True,
        freeze_first: bool = False,
        dropout: float = 0.0,
        share_layers: bool = False,
        condition: int | None = None,
        orthogonal: bool = False,
        common: int = 0,
    ) -> None:
        super().__init__(start, freeze_first=freeze_first, dropout=dropout, residual=residual, common=common)
        self.groups = [list(g) for g in groups]
        self.condition = condition
        if condition is not None:
            self.asks = "condition"
            self.read = nn.Linear(condition, hidden, bias=False)
        self.embeddings, self.layers = nn.ParameterList(), nn.ParameterList()
        self.common_embeddings = nn.ParameterList()
        self.nets = nn.ModuleList()
        for group in self.groups:
            length = max(self.shapes[i][0][1] for i in group)
            own, shared = self.own_and_common(torch.randn(*self.tasks, length, hidden))
            self.embeddings.append(nn.Parameter(own))
            if shared is not None:
                self.common_embeddings.append(nn.Parameter(shared))
            made = self._made_at_once(group, share_layers)
            if share_layers:
                self.layers.append(nn.Parameter(torch.randn(len(group), hidden)))
            layers: list[nn.Module] = []
            for _ in range(depth - 1):
                layers += [nn.Linear(hidden, hidden), nn.Tanh()]
            last = nn.Linear(hidden, sum(self.widths(made)))
            for layer in [*layers, last] if orthogonal else []:
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight)
                    nn.init.zeros_(layer.bias)
            if residual:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            self.nets.append(nn.Sequential(*layers, last))

    def by_token(self) -> list[tuple[int, nn.Parameter]]:
        return self._rows(self.embeddings, self.common_embeddings)

    def _made_at_once(self, group: list[int], share_layers: bool) -> list[int]:
        """The sites that a row of the MLP's output is for."""
        if not share_layers:
            return group
        if odd := next((i for i in group if self.widths([i]) != self.widths(group[:1])), None):
            raise ConfigError(
                f'share="layers" makes all sites by one MLP, and {self.names[odd]} differs in heads or dimensions from '
                f"{self.names[group[0]]}; choose sites that are alike (sites=, kinds=), or leave share out"
            )
        return group[:1]

    def encode(self, given: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        states: dict[int, tuple[Tensor, Tensor]] = {}
        for n, (group, embedding, net) in enumerate(zip(self.groups, self.embeddings, self.nets, strict=True)):
            rows = self.behind(self.common_embeddings, n, self.of_tasks(embedding, given))  # (..., P, hidden)
            if self.condition is not None:
                assert given is not None
                rows = rows + self.read(given.to(embedding)).unsqueeze(-2)  # (R, P, hidden)
            if not self.layers:
                states.update(zip(group, self.cut(net(rows), group, given), strict=True))
                continue
            each = self.layers[n].view(len(group), *[1] * (rows.dim() - 1), -1) + rows  # (L, ..., P, hidden)
            for i, made in zip(group, net(each).unbind(0), strict=True):
                states[i] = self.cut(made, [i], given)[0]
        return [states[i] for i in range(len(self.names))]

    def start(self) -> States:
        """What the MLP adds to, with the frozen first token; zeros where it adds to nothing."""
        found: States = {}
        for i, name in enumerate(self.names):
            pair = []
            for kind, shape in zip(("keys", "values"), self.shapes[i], strict=True):
                rest = getattr(self, f"start_{kind}_{i}") if self.residual else self.embeddings[0].new_zeros(shape)
                pair.append(self._with_first(f"first_{kind}_{i}", rest, None) if self.freeze_first else rest)
            found[name] = (pair[0].detach().clone(), pair[1].detach().clone())
        return found


class LowRank(_Produced):
    """A change of rank k to the start: ``start + P' W_up``, P' ``(length, k)``, W_up ``(k, all sites)`` from 0.

    Tasks have a P' each and share W_up.
    """

    def __init__(
        self, start: Start, *, rank: int = 8, freeze_first: bool = False, dropout: float = 0.0, common: int = 0
    ) -> None:
        super().__init__(start, freeze_first=freeze_first, dropout=dropout, residual=True, common=common)
        own, shared = self.own_and_common(torch.randn(*self.tasks, self.length, rank))
        self.tokens = nn.Parameter(own)
        self.common_tokens = nn.ParameterList([shared] if shared is not None else [])
        self.up = nn.Parameter(torch.zeros(rank, sum(self.widths(range(len(self.names))))))

    def by_token(self) -> list[tuple[int, nn.Parameter]]:
        return self._rows([self.tokens], self.common_tokens)

    def encode(self, given: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        tokens = self.behind(self.common_tokens, 0, self.of_tasks(self.tokens, given))
        return self.cut(tokens @ self.up, range(len(self.names)), given)


def make_encoder(config: PrefixConfig, start: Start, sites: Sequence[Site]) -> PrefixEncoder:
    """The encoder that a configuration asks for, beginning at ``start``.

    Raises:
        ConfigError: the first token is to be frozen and there is no other, the common tokens are all there are, or
            the sites can't share an MLP.
    """
    shortest = min(k.shape[-2] for k, _ in start.values())
    if config.freeze_first and shortest < 2:
        raise ConfigError(f"freeze_first with a site of {shortest} token leaves nothing to train; use length 2 or more")
    if config.common >= shortest:
        raise ConfigError(
            f"common={config.common} with a site of {shortest} tokens leaves the tasks none of their own; use fewer"
        )
    shared: dict[str, Any] = {
        "freeze_first": config.freeze_first, "dropout": config.dropout, "common": config.common,
    }  # fmt: skip
    if config.reparam == "direct":
        return Direct(start, share_keys=config.share == "keys", **shared)
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
        return MLP(
            start,
            groups,
            depth=config.depth,
            hidden=config.hidden,
            residual=config.init != "random",
            share_layers=config.share == "layers",
            condition=config.condition,
            orthogonal=config.orthogonal,
            **shared,
        )
