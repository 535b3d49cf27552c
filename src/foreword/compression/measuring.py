"""What is measured before and after: a prefix's loss on held-out examples, and each token's share of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword._attached import attached
from foreword.data import Collator, EncodedDataset
from foreword.errors import DataError
from foreword.losses import IGNORED, difference, example_losses, supervised_tokens, to_device
from foreword.prefix import Prefix
from foreword.shares import measured_shares
from foreword.sites import Site, evaluating


@dataclass(frozen=True)
class HeldOut:
    """A loss on examples that nothing was trained or chosen on.

    Attributes:
        examples: the negative log-likelihood of each, in nats, summed over its tokens.
        tokens: of each, on how many tokens there is a loss.
    """

    examples: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return math.fsum(self.examples) / sum(self.tokens)

    def above(self, other: HeldOut) -> tuple[float, float]:
        """How much higher it is than another on the same examples, in nats a token, and the standard error of that."""
        return difference(self.examples, other.examples, self.tokens)


def held_out_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix | None,
    dataset: EncodedDataset,
    *,
    batch_size: int = 16,
) -> HeldOut:
    """The loss of a prefix on examples; of the base model for None. The model is detached before and after.

    Raises:
        DataError: there is no example with a token that counts.
        AttachError: the model has something attached.
        MismatchError: the prefix is of another base.
    """
    collator = _collator(model, tokenizer)
    tokens = supervised_tokens(dataset, seq2seq=collator.seq2seq)
    if not sum(tokens):
        raise DataError(
            f"none of the {len(tokens)} examples has a token to compute a loss on; give examples with outputs"
        )
    with attached(model, prefix):
        return HeldOut(example_losses(model, dataset, collator, batch_size=batch_size), tokens)


@torch.no_grad()
def token_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix,
    dataset: EncodedDataset,
    *,
    batch_size: int = 8,
    most: int = 256,
) -> dict[str, Tensor]:
    """The mean share of attention that each virtual token gets, by site: ``(kv_heads, length)``, float32.

    The mean is over the examples' real positions and over the query heads that read a key/value head. Where a prefix
    isn't seen (an infix), the share is 0; behind a zero-initialised gate it is the weight that a value comes in with.

    Args:
        most: examples that are looked at, from the first on.

    Raises:
        DataError: there is no example.
    """
    if not len(dataset):
        raise DataError("there is no example to measure the shares of attention on; give some")
    collator = _collator(model, tokenizer)
    sites = [s for s in prefix.sites if prefix.length(s.name)]
    sums = {s.name: torch.zeros(s.heads, prefix.length(s.name), dtype=torch.float64) for s in sites}
    counts = dict.fromkeys(sums, 0.0)
    with attached(model, prefix), evaluating(model), measured_shares(model, by_token=True) as found:
        count = min(len(dataset), most)
        for start in range(0, count, batch_size):
            batch = collator([dataset[i] for i in range(start, min(start + batch_size, count))])
            model(**to_device(batch, model))
            for site in sites:
                share = found[site.name]  # (B, H, S, P)
                real = _real_positions(site, batch, share.shape[2], collator.seq2seq)  # (B, S)
                sums[site.name] += torch.einsum("bhsp,bs->hp", share.double(), real.double())
                counts[site.name] += float(real.sum())
    return {
        s.name: (sums[s.name] / max(1.0, counts[s.name])).view(s.kv_heads, -1, prefix.length(s.name)).mean(1).float()
        for s in sites
    }


def _real_positions(site: Site, batch: Mapping[str, Tensor], queries: int, seq2seq: bool) -> Tensor:
    """``(B, S)``: which queries of a site aren't padding."""
    decoder = seq2seq and site.kind != "encoder"
    real = batch["labels"] != IGNORED if decoder else batch["attention_mask"] > 0
    return real if real.shape[1] == queries else real.new_ones(len(real), queries)


def _collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
    return Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder)
