"""How likely a model finds given texts: the negative log-likelihood per token, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _Row(NamedTuple):
    """One text as tokens; the first ``given`` of them are not scored."""

    place: int
    ids: list[int]
    given: int


def text_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    batch_size: int = 8,
    max_length: int = 256,
) -> list[float]:
    """The mean negative log-likelihood per token of each text, in nats, under the model as it stands.

    A prefix counts if the caller has attached one. With ``prompts``, each text is scored as the continuation
    of its prompt, whose own tokens are not scored. Prompt and text are tokenised apart and joined as tokens,
    so the text's tokens do not depend on the prompt: begin the text with a space if it goes on mid-sentence.
    Without a prompt, the first token has nothing before it: it is predicted from the tokenizer's
    beginning-of-sequence token if the tokenizer adds one by itself, and is otherwise not scored.

    Args:
        model: a causal language model. It is scored in eval mode, and its mode is restored afterwards.
        texts: what to score, in any order; none may be empty.
        prompts: one prompt a text; an empty one is no prompt.
        batch_size: texts in a forward pass. It does not change the result beyond rounding.
        max_length: tokens of prompt and text together; a longer text is cut at its end.

    Returns:
        One number a text, in the order of ``texts``.

    Raises:
        DataError: a text has no token that can be scored (the message gives its index), or there are not as
            many prompts as texts.
        ConfigError: batch_size or max_length is too small.
    """
    if batch_size < 1 or max_length < 2:
        raise ConfigError(f"batch_size must be at least 1 and max_length 2, not {batch_size} and {max_length}.")
    if prompts is not None and len(prompts) != len(texts):
        raise DataError(f"{len(texts)} texts but {len(prompts)} prompts: give one prompt a text.")
    given = prompts if prompts is not None else [""] * len(texts)
    rows = [
        _tokenize(tokenizer, index, text, prompt, max_length)
        for index, (text, prompt) in enumerate(zip(texts, given, strict=True))
    ]
    # Texts of like length share a batch, so that little is computed on padding.
    rows.sort(key=lambda row: len(row.ids), reverse=True)
    result = [math.nan] * len(rows)
    with eval_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            for row, nll in zip(batch, _score(model, batch), strict=True):
                result[row.place] = nll
    return result


def perplexity(nlls: Iterable[float]) -> float:
    """exp of the mean of per-text negative log-likelihoods (nats); a long text counts like a short one.

    Raises DataError if there are none.
    """
    values = list(nlls)
    if not values:
        raise DataError("The perplexity of no texts is not defined: give at least one.")
    try:
        return math.exp(math.fsum(values) / len(values))
    except OverflowError:
        return math.inf


def _tokenize(tokenizer: PreTrainedTokenizerBase, index: int, text: str, prompt: str, max_length: int) -> _Row:
    if not text.strip():
        raise DataError(f"Text {index} is empty, so it has no likelihood. Leave it out.")
    # Special tokens go at the beginning of the whole sequence only, and none at its end.
    before = _ids(tokenizer, prompt, special=True)
    after = _ids(tokenizer, text, special=False)
    # Without anything before it, the first token is context rather than something predicted.
    given = len(before) or 1
    ids = (before + after)[:max_length]
    if len(ids) <= given:
        why = (
            f"its prompt takes all of max_length={max_length} tokens; raise max_length or shorten the prompt"
            if len(before) + len(after) > max_length
            else "it is a single token with nothing before it; give it a prompt or leave it out"
        )
        raise DataError(f"Text {index} has no token to score: {why}.")
    return _Row(index, ids, given)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    # Some tokenizers (T5's and BERT's families) end every text with a token of their own.
    if special and ids and ids[-1] in {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}:
        plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not plain or plain[-1] != ids[-1]:
            ids = ids[:-1]
    return ids


def _score(model: PreTrainedModel, batch: list[_Row]) -> list[float]:
    """The mean nll of each row: one forward pass over (rows, longest) right-padded tokens."""
    import torch

    from foreword._offloaded import device_of

    longest = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    scored = torch.zeros(len(batch), longest, dtype=torch.bool)
    for place, row in enumerate(batch):
        length = len(row.ids)
        ids[place, :length] = torch.tensor(row.ids)
        mask[place, :length] = 1
        scored[place, row.given : length] = True
    # Not model.device: of a model spread over devices, the tokens belong where the embedding is.
    device = device_of(model.get_input_embeddings())
    ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
    with torch.no_grad():
        output: Any = model(input_ids=ids, attention_mask=mask, use_cache=False)
        nll = _token_nll(output.logits[:, :-1], ids[:, 1:])
    kept = scored[:, 1:].to(nll.device)
    # where, not a product: a non-finite value at padding must not reach the sum.
    total = torch.where(kept, nll, 0.0).double().sum(dim=1)
    means: list[float] = (total / kept.sum(dim=1)).tolist()
    return means


def _token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target, in 32 bits: (rows, n, vocabulary) and (rows, n) -> (rows, n).

    Row by row, because the 32-bit log-probabilities of a whole batch would be the largest tensor of all.
    """
    import torch

    targets = targets.to(logits.device)
    rows = [
        torch.nn.functional.cross_entropy(row.float(), target, reduction="none")
        for row, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(rows)


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode for a while; each submodule gets back the mode it had (a caller may have mixed them)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
