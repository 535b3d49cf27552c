"""The negative log-likelihood of examples under what stands on a model, and how sure a difference of two is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from foreword._boundary import told
from foreword._under_way import BOUNDARY
from foreword.data.mixture import Rows
from foreword.sites import evaluating, input_device

IGNORED = -100


@torch.no_grad()
def example_losses(
    model: PreTrainedModel,
    dataset: Rows,
    collator: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    *,
    batch_size: int = 16,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    done: Callable[[int], None] | None = None,
) -> list[float]:
    """The negative log-likelihood of each example, in nats, summed over its tokens. In eval mode; modes are kept.

    Args:
        collator: makes a batch of examples, with ``labels`` (``foreword.data.Collator``).
        batch_size: examples in a pass. Those of like length share one, so that little is computed on padding.
        prepare: what is done to a batch before the call, e.g. a trainer's way to its device; None: to the model's.
        done: told after each pass how many examples it had.
    """
    shift = _shift(bool(model.config.is_encoder_decoder))
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["input_ids"]), reverse=True)
    found = [math.nan] * len(dataset)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = dict(collator([dataset[i] for i in rows]))
            batch = prepare(batch) if prepare is not None else to_device(batch, model)
            # Said beside the call: a model with nothing on it doesn't know this argument.
            with told(counted=batch.pop(BOUNDARY, None), labels=batch.get("labels")):
                logits = model(**batch).logits
            for i, row, labels in zip(rows, logits, batch["labels"], strict=True):
                found[i] = _summed(row, labels, shift)
            if done is not None:
                done(len(rows))
    return found


def _shift(seq2seq: bool) -> int:
    """By how many places labels are ahead of the logits that predict them."""
    return 0 if seq2seq else 1


def _summed(logits: Tensor, labels: Tensor, shift: int) -> float:
    """Of one example, ``(S, vocabulary)`` and ``(S,)``.

    One by one, because the 32-bit log-probabilities of a whole batch would be the largest tensor of all.
    """
    logits, labels = logits[: len(logits) - shift].float(), labels[shift:].to(logits.device)
    return float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").double().sum())


def supervised_tokens(dataset: Rows, *, seq2seq: bool) -> list[int]:
    """Of each example, on how many tokens there is a loss."""
    rows = (dataset[i]["labels"][_shift(seq2seq) :] for i in range(len(dataset)))
    return [sum(label != IGNORED for label in labels) for labels in rows]


def difference(ours: Sequence[float], theirs: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """How much higher our loss is than theirs on the same examples, in nats a token, and the standard error of that.

    The difference of two ratios of sums over n examples; its standard error is that of the mean of
    ``d_i - difference * tokens_i``.

    Args:
        ours, theirs: ``(n,)`` losses summed over each example's tokens.
        tokens: ``(n,)``
    """
    n, total = len(tokens), sum(tokens)
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = math.fsum(each) / total
    rest = [d - mean * t for d, t in zip(each, tokens, strict=True)]
    error = math.sqrt(math.fsum(r * r for r in rest) * n / max(1, n - 1)) / total if n > 1 else math.inf
    return mean, error


def to_device(batch: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """A batch where the model's embedding is (parts of a model may be elsewhere)."""
    place = input_device(model)
    return {name: value.to(place) if isinstance(value, Tensor) else value for name, value in batch.items()}
