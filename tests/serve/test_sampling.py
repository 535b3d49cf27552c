"""How tokens are chosen, against transformers' own warpers, and draws that are a request's own."""

from __future__ import annotations

import collections

import engines
import pytest
import torch
from engines import engine, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

import zoo
from foreword.serve._text import Text
from foreword.serve.request import Answer, Request, Sampling
from foreword.serve.sampling import choose_tokens, thresholds


def answer(index=0, **options):
    request = Request([3], Sampling(**options), None, lambda piece: None)
    return Answer(request, index, Text(zoo.tokenizer()), frozenset())


@settings(max_examples=60)
@given(
    st.integers(2, 3000), st.lists(st.tuples(st.integers(0, 40), st.floats(0.01, 1.0)), min_size=1, max_size=5),
    st.integers(0, 99), st.floats(0.01, 8.0),
)  # fmt: skip
def test_what_may_be_drawn_is_what_transformers_leaves(size, cuts, seed, spread):
    scores = spread * torch.randn(len(cuts), size, generator=torch.Generator().manual_seed(seed))
    top_k, top_p = zip(*cuts, strict=True)
    floor = thresholds(scores, top_k, top_p)
    for row, (k, p) in enumerate(cuts):
        want = scores[row : row + 1].clone()
        want = TopKLogitsWarper(min(k, size))(None, want) if k else want
        want = TopPLogitsWarper(p)(None, want) if p < 1 else want
        ours, theirs = int((scores[row] >= floor[row]).sum()), int(want.isfinite().sum())
        # Sums of the same numbers in another order: the last token that fits may be one more or less.
        probabilities = torch.softmax(scores[row].double(), 0).sort(descending=True).values
        inside = probabilities[: k or size].div(probabilities[: k or size].sum()).cumsum(0)
        near = bool(((inside - p).abs() < 1e-5).any())
        assert ours == theirs or (near and abs(ours - theirs) <= int(((inside - p).abs() < 1e-5).sum())), (k, p)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 0.5]]).expand(4000, -1)
    for options, want in (
        ({"temperature": 1.0}, torch.softmax(logits[0], 0)),
        ({"temperature": 0.5}, torch.softmax(logits[0] / 0.5, 0)),
        ({"temperature": 1.0, "top_k": 2}, torch.tensor([0, 0.2689, 0.7311, 0, 0])),
        ({"temperature": 1.0, "top_p": 0.5}, torch.tensor([0, 0.0, 1.0, 0, 0])),
        ({"temperature": 0.0}, torch.tensor([0, 0.0, 1.0, 0, 0])),
        ({"temperature": 1.0, "logit_bias": {0: 100.0}}, torch.tensor([1.0, 0, 0.0, 0, 0])),
    ):
        tokens, scores, sound = choose_tokens(logits, [answer(i, seed=1, **options) for i in range(4000)])
        counts = collections.Counter(tokens)
        got = torch.tensor([counts[i] / 4000 for i in range(5)])
        torch.testing.assert_close(got, want.float(), atol=0.04, rtol=0)
        assert all(sound) and not any(scores)


def test_penalties_and_biases_are_those_of_the_interface():
    logits = torch.tensor([[1.0, 0.9, 0.8], [1.0, 0.9, 0.8], [1.0, 0.9, 0.8], [1.0, 0.9, 0.8]])
    rows = [
        answer(temperature=0.0, presence_penalty=0.15), answer(temperature=0.0, frequency_penalty=0.06),
        answer(temperature=0.0, frequency_penalty=-0.15), answer(temperature=0.0, logit_bias={2: 0.3}),
    ]  # fmt: skip
    for row, counts in zip(rows, ({0: 5}, {0: 2}, {1: 1}, {}), strict=True):
        row.counts = counts
    assert choose_tokens(logits, rows)[0] == [1, 1, 1, 2]
    assert logits[0].tolist() == pytest.approx([1.0, 0.9, 0.8])  # the model's own stay for the log-probabilities


def test_scores_are_the_models_own():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [
        answer(temperature=0.7, seed=1, logprobs=3), answer(temperature=0.0, logprobs=0),
        answer(temperature=0.0, logprobs=2, logit_bias={7: 99.0}),
    ]  # fmt: skip
    tokens, scores, _ = choose_tokens(logits, rows)
    want = logits.log_softmax(-1)
    for row, (token, score) in enumerate(zip(tokens, scores, strict=True)):
        assert score.token == token and score.logprob == pytest.approx(float(want[row, token]), abs=1e-6)
    best = want[0].topk(3)
    assert [t for t, _ in scores[0].top] == best.indices.tolist()
    assert [p for _, p in scores[0].top] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert scores[1].top == () and len(scores[2].top) == 2 and tokens[2] == 7


def test_rows_that_are_not_finite_are_told_from_others():
    logits = torch.zeros(4, 10)
    logits[1, 3], logits[2, 0], logits[3] = float("nan"), float("inf"), -float("inf")
    rows = [answer(temperature=t, seed=1, logprobs=1) for t in (1.0, 1.0, 0.0, 1.0)]
    tokens, scores, sound = choose_tokens(logits, rows)
    assert sound == [True, False, False, False] and scores[0] is not None and scores[1:] == [None] * 3
    assert 0 <= tokens[0] < 10


def test_a_seed_gives_the_same_answer_whoever_runs_beside_it():
    held = engines.library()
    mine = Sampling(max_tokens=20, temperature=1.5, seed=7, n=2, top_p=0.95)
    with engine(held) as made:
        alone = made.generate([prompt(6)], mine, "long")[0]
        again = made.generate([prompt(6)], mine, "long")[0]
        others = [prompt(4, i) for i in range(4)]
        sampling = Sampling(max_tokens=9, temperature=1.0, seed=3)
        import threading

        beside = threading.Thread(target=lambda: made.generate(others, sampling, ["short", None, "middle", "long"]))
        beside.start()
        mixed = made.generate([prompt(6)], mine, "long")[0]
        beside.join()
        other = made.generate([prompt(6)], Sampling(max_tokens=20, temperature=1.5, seed=8), "long")[0]
        free = [made.generate([prompt(6)], Sampling(max_tokens=20, temperature=1.5), "long")[0][0].tokens for _ in "ab"]
    assert [a.tokens for a in alone] == [a.tokens for a in again] == [a.tokens for a in mixed]
    assert alone[0].tokens != alone[1].tokens != other[0].tokens and free[0] != free[1]
    assert torch.initial_seed() == 0  # nothing is drawn from the generator that everybody shares
