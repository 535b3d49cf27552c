"""The next token of each row, from the model's scores: greedy, or drawn with each row's own random numbers.

Everything here is row by row: what a row gets depends on its own scores and draws alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foreword.serve.request import Answer, TokenScore

_CANDIDATES = 1024  # the likeliest tokens that are sorted; all of them only where these are not enough


def choose_tokens(logits: Tensor, answers: Sequence[Answer]) -> tuple[list[int], list[TokenScore | None], list[bool]]:
    """The next token of each answer, its scores where they are asked for, and whether the model gave numbers at all.

    Args:
        logits: ``(R, V)``, one row an answer.
    """
    logits = logits.float()
    scores = _adjusted(logits, answers)
    best = scores.max(-1)  # not a number if anything in the row is none
    sound = torch.isfinite(best.values).tolist()
    tokens: list[int] = best.indices.tolist()
    drawing = [i for i, a in enumerate(answers) if a.sampling.temperature > 0 and sound[i]]
    if drawing:
        rows = scores if len(drawing) == len(answers) else scores[drawing]
        for i, token in zip(drawing, _draw(rows, [answers[i] for i in drawing]), strict=True):
            tokens[i] = token
    return tokens, _token_scores(logits, answers, tokens, sound), sound


def _adjusted(logits: Tensor, answers: Sequence[Answer]) -> Tensor:
    """With penalties and biases."""
    if all(a.sampling.plain for a in answers):
        return logits
    logits = logits.clone()
    for row, answer in enumerate(answers):
        sampling = answer.sampling
        change = dict(sampling.logit_bias)
        for token, count in answer.counts.items():
            off = sampling.presence_penalty + sampling.frequency_penalty * count
            change[token] = change.get(token, 0.0) - off
        if change:
            tokens = torch.tensor(list(change), device=logits.device)
            logits[row, tokens] += torch.tensor(list(change.values()), device=logits.device)
    return logits


def _draw(scores: Tensor, answers: Sequence[Answer]) -> list[int]:
    """A token of each row by the inverse of its distribution function, at a random number of the row's own."""
    device = scores.device
    temperature = torch.tensor([a.sampling.temperature for a in answers], device=device, dtype=scores.dtype)
    scores = scores / temperature.clamp(min=1e-6)[:, None]  # as good as 0, and no overflow
    cut = [i for i, a in enumerate(answers) if a.sampling.top_k or a.sampling.top_p < 1]
    if cut:
        rows = [answers[i].sampling for i in cut]
        floor = thresholds(scores[cut], [s.top_k for s in rows], [s.top_p for s in rows])
        scores[cut] = scores[cut].masked_fill(scores[cut] < floor, -torch.inf)
    below = torch.softmax(scores, dim=-1).cumsum(-1, dtype=torch.float64)
    at = torch.tensor([a.random.random() for a in answers], device=device, dtype=torch.float64)[:, None]
    found = torch.searchsorted(below, at * below[:, -1:], right=True)
    return [int(t) for t in found.clamp(max=scores.shape[1] - 1).flatten().tolist()]


def thresholds(scores: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """The least score of each row that may be drawn: ``(R, 1)``.

    As transformers has it: the ``top_k`` likeliest tokens, and of these the fewest likeliest whose probability reaches
    ``top_p``; but tokens of equal scores stay or go together.
    """
    size = scores.shape[1]
    most = torch.tensor([k if 0 < k < size else size for k in top_k], device=scores.device)[:, None]
    share = torch.tensor(top_p, device=scores.device, dtype=scores.dtype)[:, None]
    wanted = max((k for k in top_k if 0 < k < size), default=0)
    candidates = min(size, max(wanted, _CANDIDATES))
    while True:
        sorted_scores = scores.topk(candidates).values  # (R, C)
        inside = torch.arange(candidates, device=scores.device) < most
        kept = sorted_scores.masked_fill(~inside, -torch.inf)
        # Where top_k cuts, the rest is made of the candidates alone; else of all tokens.
        total = torch.where(most < size, kept.logsumexp(-1, keepdim=True), scores.logsumexp(-1, keepdim=True))
        before = (kept - total).exp().cumsum(-1).roll(1, dims=-1)
        before[:, 0] = 0.0
        inside &= (before < share) | (share >= 1)
        count = inside.sum(-1, keepdim=True)
        if candidates == size or not bool(((count == candidates) & (most > candidates)).any()):
            break
        candidates = size
    # A row that only top_p is asked of, and that needs no cut (1), ends at its least score.
    return torch.where(count >= size, -torch.inf, sorted_scores.gather(1, (count - 1).clamp(min=0)))


def _token_scores(
    logits: Tensor, answers: Sequence[Answer], tokens: Sequence[int], sound: Sequence[bool]
) -> list[TokenScore | None]:
    found: list[TokenScore | None] = [None] * len(answers)
    asked = [i for i, a in enumerate(answers) if a.sampling.logprobs is not None and sound[i]]
    if not asked:
        return found
    logprobs = logits[asked].log_softmax(-1)
    most = max(answers[i].sampling.logprobs or 0 for i in asked)
    top = logprobs.topk(min(most, logprobs.shape[1])) if most else None
    for row, i in enumerate(asked):
        alternatives: tuple[tuple[int, float], ...] = ()
        wanted = answers[i].sampling.logprobs
        if top is not None and wanted:
            alternatives = tuple(
                zip(top.indices[row, :wanted].tolist(), top.values[row, :wanted].tolist(), strict=True)
            )
        found[i] = TokenScore(tokens[i], float(logprobs[row, tokens[i]]), alternatives)
    return found
