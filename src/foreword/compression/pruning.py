"""Fewer tokens: those go that the model looks at least.

A token of a prefix is nothing but a key and a value of each head, so the heads of a site may lose different ones; only
their number is the same. Over sites, the tokens that stay are those with the largest shares anywhere (unless
``uniform``), so a layer that hardly reads its prefix may lose all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from foreword.compression._checks import check_shares, check_tokens
from foreword.prefix import Prefix


def prune(prefix: Prefix, shares: Mapping[str, Tensor], tokens: int, *, uniform: bool = False) -> Prefix:
    """The prefix with the tokens that get the largest shares of attention.

    Args:
        shares: of attention, by site ``(kv_heads, length)``, as :func:`token_shares` measures them.
        tokens: at each site; sites that have no more keep theirs.
        uniform: as many tokens at each site. Otherwise as many in all, wherever they are seen most.

    Raises:
        ConfigError: not one token, or no fewer than there are.
        MismatchError: the shares are of another prefix.
    """
    check_tokens(prefix, tokens)
    check_shares(prefix, shares)
    ranked = {name: _by_head(prefix, name, share) for name, share in shares.items()}
    kept = {name: min(tokens, share.shape[1]) for name, share in ranked.items()}
    if not uniform:
        kept = _everywhere(ranked, sum(kept.values()))
    indices = {n: share.topk(kept[n], dim=1).indices.sort(dim=1).values for n, share in ranked.items()}
    keys, values, log_weights = dict(prefix.keys), dict(prefix.values), dict(prefix.log_weights)
    for name, index in indices.items():
        keys[name], values[name] = _chosen(prefix.keys[name], index), _chosen(prefix.values[name], index)
        if name in log_weights:
            log_weights[name] = log_weights[name][index[0].to(log_weights[name].device)]
    return replace(prefix, keys=keys, values=values, log_weights=log_weights)


def _by_head(prefix: Prefix, site: str, share: Tensor) -> Tensor:
    """Shares to choose by; where tokens have weights, which all heads have in common, these lose the same ones."""
    if site not in prefix.log_weights:
        return share
    return share.mean(0, keepdim=True).expand_as(share)


def _everywhere(shares: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """How many tokens each site keeps when the ``total`` largest shares stay.

    What a site loses with its n-th token is the mean over its heads of their n-th largest shares, which falls with n:
    so the largest of all sites together are the first ones of each.
    """
    falling = {n: s.sort(dim=1, descending=True).values.mean(0) for n, s in shares.items()}
    owners = torch.cat([torch.full((len(s),), i) for i, s in enumerate(falling.values())])
    chosen = torch.cat(list(falling.values())).argsort(descending=True, stable=True)[:total]
    counts = owners[chosen].bincount(minlength=len(falling))
    return dict(zip(falling, counts.tolist(), strict=True))


def _chosen(states: Tensor, index: Tensor) -> Tensor:
    """``(G, P, dim)`` at ``(G, n)`` -> ``(G, n, dim)``."""
    return states.gather(1, index.to(states.device)[..., None].expand(-1, -1, states.shape[2]))
