"""How likely a model finds given texts: the negative log-likelihood per token, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def text_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    batch_size: int = 8,
    max_length: int = 256,
    cut_prompts: bool = False,
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
        cut_prompts: let a prompt lose its start, as a long input does in training, where it would leave its text less
            than half of ``max_length`` (or than it needs).

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
        _tokenize(tokenizer, index, text, prompt, max_length, cut_prompts)
        for index, (text, prompt) in enumerate(zip(texts, given, strict=True))
    ]
    from foreword.data import Collator
    from foreword.losses import example_losses, supervised_tokens

    pad = Collator(0)  # a padding token changes nothing, and not every tokenizer has one

    def collate(examples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return {**pad(examples), "use_cache": False}

    losses = example_losses(model, rows, collate, batch_size=batch_size)
    tokens = supervised_tokens(rows, seq2seq=False)
    return [loss / count for loss, count in zip(losses, tokens, strict=True)]


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


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, index: int, text: str, prompt: str, max_length: int, cut_prompt: bool
) -> dict[str, list[int]]:
    """Ids and labels as :func:`foreword.data.encode` makes them: what is not scored has -100."""
    if not text.strip():
        raise DataError(f"Text {index} is empty, so it has no likelihood. Leave it out.")
    # Special tokens go at the beginning of the whole sequence only, and none at its end.
    before = _ids(tokenizer, prompt, special=True)
    after = _ids(tokenizer, text, special=False)
    if cut_prompt:
        before = before[-(max_length - min(len(after), max_length // 2)) :]
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
    return {"input_ids": ids, "labels": [-100] * given + ids[given:]}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    # Some tokenizers (T5's and BERT's families) end every text with a token of their own.
    if special and ids and ids[-1] in {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}:
        plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not plain or plain[-1] != ids[-1]:
            ids = ids[:-1]
    return ids
