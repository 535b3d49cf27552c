"""Metrics that other models give: likelihood under the frozen base, sentiment by a classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from foreword.errors import DataError
from foreword.evaluate._counts import Counts, Given, Numbers, mean
from foreword.evaluate.perplexity import perplexity as mean_perplexity
from foreword.evaluate.perplexity import text_nll
from foreword.evaluate.sentiment import TrainedSentiment, train_on_reviews

_SIGNS = {
    **dict.fromkeys(("1", "positive", "pos", "favourable", "favorable", "good", "true"), True),
    **dict.fromkeys(("0", "negative", "neg", "unfavourable", "unfavorable", "bad", "false"), False),
}


def perplexity(given: Given) -> Counts:
    """Perplexity of the texts by themselves under the base model: how fluent it finds them."""
    return _perplexity(given, [""] * len(given.predictions))


def perplexity_after_input(given: Given) -> Counts:
    """The same of the texts as continuations of their inputs."""
    return _perplexity(given, given.inputs)


def _perplexity(given: Given, prompts: Sequence[str]) -> Counts:
    from foreword._holder import require_detached

    model, tokenizer = given.tools["model"], given.tools["tokenizer"]
    require_detached(model)  # the judge of fluency is the base model, whatever wrote the texts
    scored = [
        i
        for i, (text, prompt) in enumerate(zip(given.predictions, prompts, strict=True))
        if text.strip() and len(tokenizer(text, add_special_tokens=False)["input_ids"]) > (0 if prompt else 1)
    ]
    if not scored:
        raise DataError("no prediction has two tokens or more, so none has a likelihood; look at the predictions")
    values = text_nll(
        model,
        tokenizer,
        [given.predictions[i] for i in scored],
        prompts=[prompts[i] for i in scored],
        batch_size=given.tools.get("batch_size", 8),
        max_length=512,
        cut_prompts=True,
    )
    rows = np.zeros((len(prompts), 2))
    rows[scored, 0], rows[scored, 1] = values, 1.0
    each = [math.nan] * len(prompts)
    for i, value in zip(scored, values, strict=True):
        each[i] = mean_perplexity([value])
    left = len(prompts) - len(scored)
    note = f"{left} empty or one-token texts left out" if left else ""
    return Counts(rows, _exp_mean, tuple(each), note)


def _exp_mean(sums: Numbers) -> float:
    return mean_perplexity([float(sums[0] / sums[1])]) if sums[1] else math.nan


def sentiment(given: Given) -> Counts:
    """The share of texts that read as they were meant to: favourable or unfavourable."""
    wanted = signs(given)
    judge: TrainedSentiment = given.tools.get("judge") or _trained()
    found = judge.classifier.positive_probability(list(given.predictions))
    note = (
        f"the classifier is right on {judge.accuracy:.1%} of {judge.held_out_reviews:,} held-out reviews "
        f"(trained on {judge.train_reviews:,})"
    )
    return mean([float((p > 0.5) == w) for p, w in zip(found, wanted, strict=True)], note=note)


def _trained() -> TrainedSentiment:
    from foreword.models import packaged_reviews

    return train_on_reviews(packaged_reviews())


def signs(given: Given) -> list[bool]:
    """Whether each text was meant to be favourable. Raises DataError for a label that says neither."""
    for place, label in enumerate(given.labels):
        if label.strip().casefold() not in _SIGNS:
            raise DataError(
                f"the label of example {place} is {label!r}; sentiment needs positive or negative (or 1 or 0)"
            )
    return [_SIGNS[label.strip().casefold()] for label in given.labels]
