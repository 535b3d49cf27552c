"""Perplexity under the base and sentiment by a classifier, as metrics."""

from __future__ import annotations

import math

import pytest

import foreword as fw
import zoo
from foreword.errors import AttachError, DataError
from foreword.evaluate import SentimentClassifier, TrainedSentiment, perplexity, text_nll
from foreword.evaluate.metrics import score

TEXTS = ["The film is good.", "", "a place that is not for families", "the city centre"]
INPUTS = ["Write", "There is", "There is", "Write a review of"]


@pytest.fixture(scope="module")
def base():
    return zoo.build("llama").eval(), zoo.tokenizer()


def test_perplexity_is_that_of_the_texts_that_have_one(base):
    model, tokenizer = base
    found = score(TEXTS, metrics=["perplexity", "perplexity-after-input"], inputs=INPUTS, model=model,
                  tokenizer=tokenizer, intervals=50)  # fmt: skip
    scored = [0, 2, 3]
    alone = text_nll(model, tokenizer, [TEXTS[i] for i in scored])
    after = text_nll(model, tokenizer, [TEXTS[i] for i in scored], prompts=[INPUTS[i] for i in scored])
    assert found["perplexity"].value == pytest.approx(perplexity(alone), rel=1e-5)
    assert found["perplexity-after-input"].value == pytest.approx(perplexity(after), rel=1e-5)
    each = found["perplexity"].per_example
    assert math.isnan(each[1]) and each[0] == pytest.approx(math.exp(alone[0]), rel=1e-5)
    assert found["perplexity"].note == "1 empty or one-token texts left out"
    assert found["perplexity"].low <= found["perplexity"].value <= found["perplexity"].high


def test_a_prefix_would_not_be_the_base(base):
    model, tokenizer = base
    tuning = fw.attach(model, fw.PrefixConfig(length=2, init="random"))
    try:
        with pytest.raises(AttachError, match="detach"):
            score(TEXTS, metrics=["perplexity"], model=model, tokenizer=tokenizer)
    finally:
        tuning.detach()


def test_an_input_longer_than_what_is_looked_at_loses_its_start(base):
    model, tokenizer = base
    long = " ".join(INPUTS * 200)
    found = score(TEXTS[:1], metrics=["perplexity-after-input"], inputs=[long], model=model, tokenizer=tokenizer)
    cut = text_nll(model, tokenizer, TEXTS[:1], prompts=[long], max_length=512, cut_prompts=True)
    assert found["perplexity-after-input"].value == pytest.approx(math.exp(cut[0]))


def test_texts_without_any_token_to_score(base):
    with pytest.raises(DataError, match="two tokens or more"):
        score(["", " "], metrics=["perplexity"], model=base[0], tokenizer=base[1])


def test_sentiment_is_the_share_that_reads_as_wanted():
    classifier = SentimentClassifier(min_texts=1).fit(["a great film", "great", "an awful film", "awful"], [1, 1, 0, 0])
    judge = TrainedSentiment(classifier, 0.875, {}, 900, 100, 0)
    texts = ["great!", "awful", "great and great", "awful awful"]
    found = score(texts, metrics=["sentiment"], labels=["positive", "NEG", "0", " 0 "], judge=judge)["sentiment"]
    assert found.value == 75 and found.per_example == (100, 100, 0, 100)
    assert "right on 87.5% of 100 held-out reviews" in found.note


@pytest.mark.slow
def test_the_judge_is_trained_on_the_packaged_reviews_by_itself():
    texts = ["A delight from start to end, with a wonderful cast.", "A dull waste of two hours, badly acted."] * 2
    labels = ["positive", "negative", "negative", "positive"]
    found = score(texts, metrics=["sentiment"], labels=labels, intervals=100)["sentiment"]
    assert found.value == 50 and found.per_example == (100, 100, 0, 0) and found.low < 50 < found.high
    accuracy = float(found.note.split("right on ")[1].split("%")[0])
    assert 78 < accuracy < 90
