"""How large the virtual tokens' keys and values are, beside those of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword.evaluate.inside._rows import Batches, Unavailable, require_plain, rows_of
from foreword.evaluate.inside.attention import Progress, silent
from foreword.prefix import Prefix
from foreword.sites import Call, evaluating, recording, sites


@dataclass(frozen=True)
class SiteNorms:
    """Lengths of vectors at one site, mean over key/value heads.

    Attributes:
        keys, values: by virtual token.
        text_keys, text_values: mean over the texts' tokens after the first.
        first_key, first_value: of the first token, which is often unlike the others (a sink).
    """

    name: str
    kind: str
    keys: list[float]
    values: list[float]
    text_keys: float | None
    text_values: float | None
    first_key: float | None
    first_value: float | None


@dataclass(frozen=True)
class Norms:
    """Norms at all sites."""

    sites: list[SiteNorms]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def norms(
    model: PreTrainedModel, prefix: Prefix, batches: Batches, *, force: bool = False, progress: Progress = silent
) -> Norms | Unavailable:
    """Norms of the prefix's keys and values, and of the text's own in the base model.

    Args:
        model: the base model, with nothing attached.
        batches: arguments of forward passes, padded on the right.
        force: accept other weights of the base model.
        progress: is told of each pass.

    Raises:
        MismatchError: the prefix belongs to another model.
    """
    require_plain(prefix)
    chosen = [s for s in prefix.sites if prefix.length(s.name)]
    if not chosen:
        return Unavailable("there are no virtual tokens in it")
    rows = rows_of(model, batches)
    prefix.check_fits(model, sites(model, rows[0]), force=force)
    text: dict[str, list[tuple[Tensor, Tensor]]] = {s.name: [] for s in chosen}

    def observe(call: Call, _: str) -> None:
        if call.name in text:  # (B, G, N, dim) -> (N,)
            text[call.name].append((_by_token(call.key[0]), _by_token(call.value[0])))

    with recording(model, observe), evaluating(model), torch.no_grad():
        for i, row in enumerate(rows):
            model(**row)
            progress(i + 1, len(rows))
    found = []
    for site in chosen:
        (keys, first_key), (values, first_value) = (_text([pair[j] for pair in text[site.name]]) for j in (0, 1))
        own = (_by_token(prefix.keys[site.name]).tolist(), _by_token(prefix.values[site.name]).tolist())
        found.append(SiteNorms(site.name, site.kind, *own, keys, values, first_key, first_value))
    return Norms(found)


def _by_token(states: Tensor) -> Tensor:
    """``(G, N, dim)`` -> ``(N,)``."""
    return states.detach().float().norm(dim=-1).mean(0).cpu()


def _text(each: Sequence[Tensor]) -> tuple[float | None, float | None]:
    """Mean of the tokens after the first, and of the first."""
    rest = torch.cat([e[1:] for e in each]) if each else torch.empty(0)
    return float(rest.mean()) if len(rest) else None, float(torch.stack([e[0] for e in each]).mean()) if each else None
