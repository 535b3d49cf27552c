"""How much of the attention the virtual tokens get: by layer, head, position, token and length of the text.

The share of a prefix is its weight in the joint softmax, ``alpha = exp(l2 - l)`` (``foreword.attention``). All that
it has, the text has lost: a softmax over the text alone gives key j the weight ``p_j``, the joint one
``(1 - alpha) p_j``. So of ``alpha``, the part ``alpha p_0`` came from the text's first token, which models use as a
*sink* for attention that has nowhere to go (Xiao et al. 2023, arXiv 2309.17453).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword import shares
from foreword._masks import is_causal
from foreword._views import BatchPrefix
from foreword.errors import ConfigError, DataError
from foreword.evaluate.inside._rows import Batches, Row, Unavailable, all_see, grown, rows_of, standing, tokens_in
from foreword.prefix import Prefix
from foreword.sites import Call, Site, evaluating, recording

Progress = Callable[[int, int], None]  # passes done, and of how many
GROWN = 4  # texts of each length
LONGEST = 512


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class SiteShare:
    """The prefix's share at one site. None: the softmaxes stand apart (a zero-initialised gate), so there is none.

    Where several layers share one module (ALBERT), the mean over its calls.

    Attributes:
        heads: by query head, mean over texts and positions.
        positions: by position of the query, mean over texts and heads.
        tokens: by virtual token, mean over texts, positions and heads; behind a zero-initialised gate, the weight that
            its value comes in with.
        from_first: of what the prefix gets, the part that the text's first token would have if this site alone had no
            prefix.
        first: share of the text's first token beside the prefix, over queries that see more than it.
        first_base: the same in the base model.
    """

    name: str
    kind: str
    heads: list[float | None]
    positions: list[float | None]
    tokens: list[float]
    from_first: float | None
    first: float | None
    first_base: float | None

    @property
    def mean(self) -> float | None:
        """Over heads, texts and positions."""
        known = [h for h in self.heads if h is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class AttentionShare:
    """Shares at all sites.

    Attributes:
        texts, queries: how many were looked at.
        sites: as trained.
        without_gates: with the weights per head and query, and zero-initialised gates, taken off; None: it has none.
        weights: what stands in the way by site: ``{"kind": "head" | "zero" | "input", "heads": [...]}``, factors on the
            prefix's weight (``head``), gates (``zero``), or None (``input``, one a query).
    """

    texts: int
    queries: int
    sites: list[SiteShare]
    without_gates: list[SiteShare] | None
    weights: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Dilution:
    """Shares against the length of the text, for the queries that see all of it: the last one at a causal site.

    Attributes:
        lengths: tokens of the text.
        texts: how many texts of each length.
        virtual: virtual tokens at the longest site.
        variants: by variant and site, one share a length, mean over texts and heads.
        kinds: of the sites.
    """

    lengths: list[int]
    texts: int
    virtual: int
    variants: dict[str, dict[str, list[float | None]]]
    kinds: dict[str, str]

    @property
    def uniform(self) -> list[float]:
        """What tokens that are all alike would get: ``P / (P + length)``."""
        return [self.virtual / (self.virtual + n) for n in self.lengths]

    def mean(self, variant: str, kind: str | None = None) -> list[float | None]:
        """Over the sites (of a kind)."""
        rows = [v for n, v in self.variants[variant].items() if kind in (None, self.kinds[n])]
        columns = [[x for x in column if x is not None] for column in zip(*rows, strict=True)]
        return [sum(c) / len(c) if c else None for c in columns]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "uniform": self.uniform}


def attention_share(
    model: PreTrainedModel, prefix: Prefix, batches: Batches, *, force: bool = False, progress: Progress = silent
) -> AttentionShare | Unavailable:
    """The prefix's share of attention by site, head, position and virtual token, with and without its gates.

    Args:
        model: the base model, with nothing attached.
        batches: arguments of forward passes, padded on the right.
        force: accept other weights of the base model.
        progress: is told of each pass.
    """
    if (without := _no_tokens(prefix)) is not None:
        return without
    rows = rows_of(model, batches)
    chosen = [s for s in prefix.sites if prefix.length(s.name)]
    ungated = without_gates(prefix)
    total = len(rows) * (2 if ungated is None else 3)
    base = _first_in_base(model, chosen, rows, lambda i: progress(i, total))
    variants = [prefix] if ungated is None else [prefix, ungated]
    found = []
    for n, variant in enumerate(variants):
        sums = {s.name: _Sums(s) for s in chosen}
        add = partial(_add, sums)
        with standing(model, variant, force=force), shares.measured(model, _tokens_and_first, add):
            for i, row in enumerate(rows):
                model(**row)
                progress(len(rows) * (n + 1) + i + 1, total)
        found.append([sums[s.name].result(s.name in variant.gates, base.get(s.name)) for s in chosen])
    queries = max(sum(sums[s.name].counted) // s.calls for s in chosen)
    return AttentionShare(len(rows), queries, found[0], found[1] if len(found) > 1 else None, _weights(prefix))


def dilution(
    model: PreTrainedModel,
    prefix: Prefix,
    batches: Batches,
    *,
    lengths: Sequence[int] | None = None,
    strengths: Sequence[float] = (0.5, 2.0),
    force: bool = False,
    progress: Progress = silent,
) -> Dilution | Unavailable:
    """The prefix's share against the length of the text: the same texts, cut or grown to several lengths.

    Args:
        lengths: of the text, in tokens; None: powers of two from 8 to 512, as far as the texts and the model reach.
        strengths: weights of the prefix to try besides the trained one.
        batches, force, progress: as for :func:`attention_share`.

    Raises:
        DataError: the texts together are too short.
        ConfigError: a length that the model can't read.
    """
    rows = rows_of(model, batches)
    chosen = dilution_lengths(model, prefix, rows, lengths)
    if isinstance(chosen, Unavailable):
        return chosen
    sites = [s for s in prefix.sites if prefix.length(s.name)]
    todo: dict[str, tuple[Prefix, float]] = {"as trained": (prefix, 1.0)}
    if (ungated := without_gates(prefix)) is not None:
        todo["without its gates"] = (ungated, 1.0)
    todo |= {f"strength {s:g}": (prefix, s) for s in strengths}
    variants: dict[str, dict[str, list[float | None]]] = {}
    for n, (name, (variant, strength)) in enumerate(todo.items()):
        found: dict[str, list[float | None]] = {s.name: [] for s in sites}
        calls: dict[str, list[Tensor]] = {s.name: [] for s in sites}
        measured = shares.measured(model, shares.share, partial(_append, calls))
        with standing(model, variant, strength=strength, force=force), all_see(prefix), measured:
            for i, length in enumerate(chosen):
                model(**grown(model, rows, length, GROWN))
                for site in sites:
                    found[site.name].append(_of_whole(calls[site.name], site))
                    calls[site.name].clear()
                progress(n * len(chosen) + i + 1, len(todo) * len(chosen))
        variants[name] = found
    return Dilution(chosen, min(GROWN, len(rows)), prefix.longest, variants, {s.name: s.kind for s in sites})


def without_gates(prefix: Prefix) -> Prefix | None:
    """The same prefix with a weight of 1 everywhere; None: it has no other."""
    if not (prefix.bias or prefix.gates or prefix.readings):
        return None
    return replace(prefix, bias={}, gates={}, readings={})


# ------------------------------------------------------------------------------------------ measuring


def _no_tokens(prefix: Prefix) -> Unavailable | None:
    if prefix.longest:
        return None
    if prefix.memory:
        return Unavailable("a memory is added beside the attention and takes no share of it")
    return Unavailable("there are no virtual tokens in it, so nothing that text could attend to")


def _not_texts(model: PreTrainedModel, row: Row) -> Unavailable | None:
    """Why examples can't be cut and grown."""
    if "input_ids" not in row or any(isinstance(v, Tensor) and v.is_floating_point() for v in row.values()):
        return Unavailable(f"{type(model).__name__} is given more than token ids, and only texts can be cut and grown")
    if row["input_ids"].dim() != 2:
        return Unavailable("an example of this model is several texts, which have no one length")
    if model.config.is_encoder_decoder and "labels" not in row and "decoder_input_ids" not in row:
        return Unavailable("the data has no outputs for the decoder")
    return None


def _tokens_and_first(
    prefix: BatchPrefix, query: Tensor, key: Tensor, mask: Any, causal: bool, kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Shares by virtual token ``(B, H, S, P)``, and the first text token's in a softmax without them ``(B, H, S)``."""
    tokens = shares.share(prefix, query, key, mask, causal, kwargs, by_token=True)
    return tokens, _first(query, key, mask, causal, kwargs)


def _first(query: Tensor, key: Tensor, mask: Any, causal: bool, kwargs: Mapping[str, Any]) -> Tensor:
    scores, total = shares.text_scores(query, key, mask, causal, kwargs)
    return torch.exp(scores[..., 0] - total).nan_to_num(0.0).cpu()


def _first_in_base(
    model: PreTrainedModel, chosen: Sequence[Site], rows: Sequence[Row], done: Callable[[int], None]
) -> dict[str, float]:
    """The share of the text's first token in the base model, by site."""
    sums = {s.name: [0.0, 0] for s in chosen}
    causal_sites = {s.name for s in chosen if s.causal}

    def observe(call: Call, delegate_name: str) -> None:
        if call.name in sums:
            causal = delegate_name != "eager" and is_causal(call.module, call.query, call.mask, dict(call.kwargs))
            first = _first(call.query, call.key, call.mask, causal, call.kwargs)
            first = first[..., 1:] if call.name in causal_sites else first
            sums[call.name][0] += float(first.sum())
            sums[call.name][1] += first.numel()

    with recording(model, observe), evaluating(model), torch.no_grad():
        for i, row in enumerate(rows):
            model(**row)
            done(i + 1)
    return {name: total / n for name, (total, n) in sums.items() if n}


def _add(sums: Mapping[str, _Sums], name: str, seen: tuple[Tensor, Tensor]) -> None:
    sums[name].add(*seen)


class _Sums:
    """What is added up at one site, text by text."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.heads = torch.zeros(site.heads, dtype=torch.float64)
        self.tokens: Tensor | float = 0.0
        self.positions: list[float] = []
        self.counted: list[int] = []  # heads of texts that reach a position
        self.first = self.taken = self.taking = 0.0  # of queries that see more than the first token
        self.seeing = 0

    def add(self, tokens: Tensor, first: Tensor) -> None:
        """Of one text and call: ``(B, H, S, P)`` and ``(B, H, S)``."""
        tokens, first = tokens.double(), first.double()
        share = tokens.sum(-1)
        batch, _, length = share.shape
        self.heads += share.sum((0, 2))
        self.tokens = self.tokens + tokens.sum((0, 1, 2))
        more = length - len(self.positions)
        self.positions += [0.0] * more
        self.counted += [0] * more
        for i, value in enumerate(share.sum((0, 1)).tolist()):
            self.positions[i] += value
            self.counted[i] += batch
        if self.site.causal:  # the first query sees one token: all that it gives comes from there
            share, first = share[..., 1:], first[..., 1:]
        self.first += float(((1 - share) * first).sum())
        self.taken += float((share * first).sum())
        self.taking += float(share.sum())
        self.seeing += first.numel()

    def result(self, apart: bool, base: float | None) -> SiteShare:
        heads, queries = self.site.heads, max(1, sum(self.counted))
        by_head = (self.heads / queries).tolist()
        positions = [p / (n * heads) for p, n in zip(self.positions, self.counted, strict=True)]
        tokens = self.tokens / (queries * heads)
        return SiteShare(
            self.site.name,
            self.site.kind,
            [None] * heads if apart else by_head,
            [None] * len(positions) if apart else list(positions),
            tokens.tolist() if isinstance(tokens, Tensor) else [],
            None if apart or not self.taking else self.taken / self.taking,
            None if apart or not self.seeing else self.first / self.seeing,
            base,
        )


def _weights(prefix: Prefix) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {n: {"kind": "zero", "heads": g.tolist()} for n, g in prefix.gates.items()}
    found |= {n: {"kind": "head", "heads": b.float().exp().tolist()} for n, b in prefix.bias.items()}
    return found | {n: {"kind": "input", "heads": None} for n in prefix.readings}


def _append(calls: Mapping[str, list[Tensor]], name: str, share: Tensor) -> None:
    calls[name].append(share)


def _of_whole(calls: Sequence[Tensor], site: Site) -> float | None:
    """Mean over texts, heads and calls, of the queries that see the whole text; None: there is no share."""
    if not calls or any(share.isnan().any() for share in calls):
        return None
    return sum(float(s[..., -1].mean() if site.causal else s.mean()) for s in calls) / len(calls)


def dilution_lengths(
    model: PreTrainedModel, prefix: Prefix, rows: Sequence[Row], lengths: Sequence[int] | None
) -> list[int] | Unavailable:
    """Those asked for, or as many as there can be; raises what :func:`dilution` does."""
    if (without := _no_tokens(prefix) or _not_texts(model, rows[0])) is not None:
        return without
    there = tokens_in(model, rows)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Two less: RoBERTa and its kin count from 2.
    reach = positions - prefix.position_offset - 2 if isinstance(positions, int) and positions > 0 else None
    if lengths is None:
        most = min(there, LONGEST, reach or LONGEST)
        if most < 8:
            raise DataError(
                f"the texts have {there} tokens in all, too few to see how a share changes with length; expected 8 or "
                "more, so give longer texts"
            )
        return [n for n in (8, 16, 32, 64, 128, 256, 512) if n <= most]
    if not lengths or any(n < 1 or (reach is not None and n > reach) for n in lengths):
        raise ConfigError(
            f"lengths={list(lengths)}; expected lengths of text from 1 to what {type(model).__name__} reads"
            + (f", {reach} tokens" if reach is not None else "")
        )
    if max(lengths) > there:
        raise DataError(
            f"the texts have {there} tokens in all, so none of {max(lengths)} can be made of them; give more or longer "
            f"texts, or lengths up to {there}"
        )
    return sorted(set(lengths))
