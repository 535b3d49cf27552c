"""Each token's share of attention on a few texts, measured on a library's own model, for budgets that shorten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foreword._boundary import told
from foreword.errors import ConfigError
from foreword.serve._mixing import Choice
from foreword.shares import measured_shares

if TYPE_CHECKING:
    from foreword.prefix import Prefix
    from foreword.serve.library import Library


def token_shares(
    library: Library, prefix: Prefix, texts: Sequence[Sequence[int]], *, force: bool = False
) -> dict[str, Tensor]:
    """``Library.measure_shares``: means over the texts' positions and the query heads that read a key/value head."""
    if not texts or not all(texts):
        raise ConfigError("shares of attention are measured on texts; give some, each of one token or more")
    device = library.holdings.device
    ready = library.fitted("", prefix, force=force).to(library.holdings.dtype).to(device)
    sums: dict[str, Tensor] = {}
    with (
        torch.no_grad(),
        library.reading(Choice((ready,), None)),
        told(0),  # an infix is measured where it is seen
        measured_shares(library.model, by_token=True) as found,
    ):
        for text in texts:
            library.model(input_ids=torch.tensor([list(text)], device=device))
            for site in prefix.sites:
                if prefix.length(site.name):
                    share = found[site.name].double().sum((0, 2))  # (H, P)
                    sums[site.name] = sums.get(site.name, torch.zeros_like(share)) + share
    count = sum(map(len, texts))
    heads = {s.name: s.kv_heads for s in prefix.sites}
    return {n: (total / count).unflatten(0, (heads[n], -1)).mean(1).float() for n, total in sums.items()}
