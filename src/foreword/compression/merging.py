"""Fewer tokens: those become one whose keys point the same way.

Two tokens with the keys k1, k2 and the mean shares of attention a1, a2 become, with p_i = a_i / (a1 + a2),

    k = p1 k1 + p2 k2,    v = p1 v1 + p2 v2,    w = p1 w1 + p2 w2 + H(p)

where w is a weight added to the token's scores, 0 at first, and H(p) = -sum p log p. That is the best lower bound of
what both get together that one key can give (log sum exp(s_i) >= sum p_i s_i + H(p), with equality where p_i is their
share of it), and exact for two equal tokens: they count as 2. Token merging in vision transformers adds the log of
how many a token stands for (Bolya et al. 2022, arXiv 2210.09461), which is the same where the shares are equal and
too much where one of them is hardly seen.

The pair that is merged next is that of the least a1 a2 / (a1 + a2) * (1 - cos(k1, k2)), averaged over the heads: a
token that nobody looks at goes first, and so do two that are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from foreword.compression._checks import check_shares, check_tokens
from foreword.prefix import Prefix


def merge(prefix: Prefix, shares: Mapping[str, Tensor], tokens: int, *, weigh: bool = True) -> Prefix:
    """The prefix with similar tokens merged until each site has this many.

    Args:
        shares: of attention, by site ``(kv_heads, length)``, as :func:`token_shares` measures them.
        tokens: at each site; sites that have no more keep theirs.
        weigh: keep how much a merged token counts (``Prefix.log_weights``). Without it the prefix loses attention, and
            in return runs on kernels that take no weights (flash attention).

    Raises:
        ConfigError: not one token, or no fewer than there are.
        MismatchError: the shares are of another prefix.
    """
    check_tokens(prefix, tokens)
    check_shares(prefix, shares)
    keys, values, log_weights = dict(prefix.keys), dict(prefix.values), dict(prefix.log_weights)
    for name, share in shares.items():
        if share.shape[1] <= tokens:
            continue
        site = _Tokens(prefix.keys[name], prefix.values[name], share, prefix.log_weights.get(name))
        while site.count > tokens:
            site.merge_nearest(weigh)
        keys[name], values[name] = (t.to(prefix.keys[name]) for t in (site.kept(site.keys), site.kept(site.values)))
        if weigh or name in log_weights:
            log_weights[name] = site.weights[site.alive].float().to(prefix.keys[name].device)
    return replace(prefix, keys=keys, values=values, log_weights=log_weights)


class _Tokens:
    """The tokens of a site while they are merged; shapes as in Prefix, in float64."""

    def __init__(self, keys: Tensor, values: Tensor, shares: Tensor, weights: Tensor | None) -> None:
        self.keys, self.values = (t.detach().to("cpu", torch.float64, copy=True) for t in (keys, values))  # (G, P, dim)
        self.shares = shares.double().clamp(min=1e-12)  # (G, P)
        unweighed = torch.zeros(keys.shape[1])
        self.weights = (weights if weights is not None else unweighed).to("cpu", torch.float64, copy=True)  # (P,)
        self.alive = torch.ones(keys.shape[1], dtype=torch.bool)
        self.units = torch.nn.functional.normalize(self.keys, dim=-1)
        self.costs = torch.stack([self._costs(i) for i in range(keys.shape[1])])  # (P, P)

    @property
    def count(self) -> int:
        return int(self.alive.sum())

    def kept(self, states: Tensor) -> Tensor:
        return states[:, self.alive]

    def merge_nearest(self, weigh: bool) -> None:
        """Make the two tokens that are cheapest to merge one, at the place of the first."""
        pair = divmod(int(self.costs.argmin()), len(self.costs))
        i, j = min(pair), max(pair)
        both = torch.tensor([i, j])
        parts = self.shares[:, both] / self.shares[:, both].sum(1, keepdim=True)  # (G, 2)
        for states in (self.keys, self.values):
            states[:, i] = (parts[..., None] * states[:, both]).sum(1)
        entropy = -(parts * parts.log()).sum(1).mean() if weigh else 0.0
        self.weights[i] = (parts.mean(0) * self.weights[both]).sum() + entropy
        self.shares[:, i] += self.shares[:, j]
        self.units[:, i] = torch.nn.functional.normalize(self.keys[:, i], dim=-1)
        self.alive[j] = False
        self.costs[j], self.costs[:, j] = torch.inf, torch.inf
        self.costs[i] = self.costs[:, i] = self._costs(i)

    def _costs(self, i: int) -> Tensor:
        """Of merging a token with each other, ``(P,)``; infinite with itself and those that are gone."""
        apart = 1 - (self.units * self.units[:, i : i + 1]).sum(-1)  # (G, P)
        own = self.shares[:, i : i + 1]
        costs = (self.shares * own / (self.shares + own) * apart.clamp(min=0)).mean(0)
        costs[~self.alive] = torch.inf
        costs[i] = torch.inf
        return costs
