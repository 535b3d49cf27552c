"""Greedy matching of token embeddings against a loop over tokens; the packaged encoder on real sentences."""

from __future__ import annotations

import pytest
import torch

import zoo
from foreword.evaluate.metrics import score
from foreword.evaluate.similarity import matched, token_embeddings

TEXTS = ["the film is good", "a good film", "families in the city centre", "good"]


@pytest.fixture(scope="module")
def encoder():
    return zoo.build("bert").bert.eval(), zoo.tokenizer()


def by_loops(prediction, reference):
    """Precision, recall and F1 of BERTScore's equation 1, one token at a time."""

    def best(token, others):
        return max(float(torch.dot(token, o)) for o in others)

    precision = sum(best(t, reference) for t in prediction) / len(prediction)
    recall = sum(best(t, prediction) for t in reference) / len(reference)
    return 2 * precision * recall / (precision + recall)


def test_matching_is_the_papers_equation():
    torch.manual_seed(0)
    one, other = (torch.nn.functional.normalize(torch.rand(n, 6), dim=-1) for n in (4, 7))
    assert matched(one, other) == pytest.approx(by_loops(one, other), rel=1e-5)
    assert matched(one, one) == pytest.approx(1) and matched(one, other) == pytest.approx(matched(other, one))
    assert matched(one, torch.empty(0, 6)) == 0.0


def test_embeddings_are_those_of_each_text_alone(encoder):
    model, tokenizer = encoder
    together = token_embeddings(model, tokenizer, TEXTS, batch_size=3)
    for text, found in zip(TEXTS, together, strict=True):
        ids = tokenizer(text, return_special_tokens_mask=True)
        plain = [i for i, mark in enumerate(ids["special_tokens_mask"]) if not mark]
        with torch.no_grad():
            states = model(torch.tensor([ids["input_ids"]])).last_hidden_state[0][plain]
        torch.testing.assert_close(found, torch.nn.functional.normalize(states, dim=-1), atol=1e-5, rtol=1e-4)


def test_the_best_reference_counts(encoder):
    references = [["a city", TEXTS[0]], ["a film"], ["the city centre", "families"], [TEXTS[2]]]
    found = score(TEXTS, references, metrics=["similarity"], encoder=encoder)["similarity"]
    every = token_embeddings(*encoder, [*TEXTS, *(r for refs in references for r in refs)])
    places = iter(range(len(TEXTS), len(every)))
    expected = [max(100 * matched(every[i], every[next(places)]) for _ in refs) for i, refs in enumerate(references)]
    assert found.per_example == pytest.approx(expected, rel=1e-4)
    assert found.per_example[0] == pytest.approx(100, rel=1e-5)


def test_an_empty_prediction_is_like_nothing(encoder):
    assert score([""], [["a film"]], metrics=["similarity"], encoder=encoder)["similarity"].value == 0.0


@pytest.mark.real
def test_the_packaged_encoder_tells_a_paraphrase_from_another_subject():
    references = [["The Eagle is a cheap coffee shop by the river."]] * 3
    texts = ["An inexpensive café at the riverside is The Eagle.", "The stock market fell sharply on Monday.",
             "The Eagle is a cheap coffee shop by the river."]  # fmt: skip
    close, far, same = score(texts, references, metrics=["similarity"])["similarity"].per_example
    assert same == pytest.approx(100, abs=0.01) and far < 45 < 65 < close < 95
