"""Turning examples into token ids and labels.

The input and the output are tokenised apart and joined as ids. Joined as text, the last letters of the input
and the first of the output could merge into one token, which would be in the prompt in training but never in
generation.
"""

from __future__ import annotations

import warnings
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ._example import Conversation, Example
from ._say import in_python, option
from .chat import Turns
from .template import Chat
from .tokens import Parts, ids_of, special_ids, tokenised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .encoded import EncodedDataset, EncodeStats

IGNORED = -100


def __getattr__(name: str) -> Any:
    # EncodedDataset needs torch. Reading examples does not, and this module is imported along with that.
    if name in ("EncodedDataset", "EncodeStats"):
        from . import encoded

        return getattr(encoded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seq2seq: bool = False,
    eos: bool = True,
    turns: Turns = "all",
) -> EncodedDataset:
    """Tokenise examples for training, with the loss on the output only.

    For a causal model the ids are the tokenizer's opening special tokens (BOS, if it adds one), the input,
    the output and the end token; the labels are -100 up to the output. The first id is never supervised,
    because nothing before it could predict it. For seq2seq the ids are the input with the tokenizer's usual
    special tokens, and the labels are the output and the end token.

    A conversation goes through the chat template. Each of the assistant's answers is learned: what the template writes
    for it, down to its own end-of-turn token, as the template's ``{% generation %}`` marks say, or as rendering the
    conversation up to the answer proves. Answers whose ``weight`` is 0 are not learned, nor, in a record of a prompt
    and a completion, those of the prompt. An encoder-decoder model learns the last answer alone.

    Where an input is empty and the tokenizer opens no text by itself, the BOS token is put before the output, so that
    its first token is learned as well; not so before plain text.

    What is too long loses the start of its input; an answer before the last that loses some of its tokens so is not
    learned. When the output alone does not fit, it loses its end, the end token first. The statistics count all three,
    and ``stats.notes`` says in words what else of the examples is not learned, or not read by the model.

    Args:
        examples: At least one.
        tokenizer: A transformers tokenizer.
        max_length: The most tokens in a sequence; with seq2seq, in the input and in the output separately.
        seq2seq: Encode for an encoder-decoder model.
        eos: End the output with the end token. A template that ends its turns itself is not affected.
        turns: Which answers of a conversation are learned: "all", or the "last".

    Raises:
        DataError: If there are no examples, ``max_length`` is below 2 or leaves no room beside the special
            tokens, the tokenizer lacks an end token or a chat template that is needed, an answer can't be told from the
            rest of what the template writes, or an example leaves nothing to learn.
    """
    from .encoded import EncodedDataset

    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise DataError(f"max_length must be a whole number of at least 2; it is {max_length!r}.")
    if turns not in ("all", "last"):
        raise DataError(f'turns={turns!r}; expected "all" or "last".')
    if not examples:
        raise DataError("There are no examples to encode.")
    end = _end_ids(tokenizer) if eos else []
    fit = _fit_seq2seq if seq2seq else _fit_causal
    stats = _Counter()
    input_ids: list[array[int]] = []
    labels: list[array[int]] = []
    for example, parts in tokenised(examples, tokenizer, end, turns, seq2seq=seq2seq):
        if not parts.output or parts.output == end:
            raise DataError(f"{example.source}: the output has no tokens, so there is nothing to learn from it.")
        fitted = fit(example, parts, max_length)
        stats.add(fitted, parts, seq2seq)
        input_ids.append(array("i", fitted.ids))
        labels.append(array("i", fitted.labels))
    found = stats.result()
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    forms = {"chat" if e.messages is not None else "alpaca" if e.layout == "alpaca" else "text" for e in examples}
    return EncodedDataset(input_ids, labels, found, form=forms.pop() if len(forms) == 1 else "mixed")


@dataclass(slots=True)
class _Fitted:
    """An example that fits, and what it lost."""

    ids: list[int]
    labels: list[int]
    input_cut: bool
    output_cut: bool
    turns_cut: int = 0


@dataclass(slots=True)
class _Counter:
    examples: int = 0
    input_cut: int = 0
    output_cut: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    turns_cut: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, fitted: _Fitted, parts: Parts, seq2seq: bool) -> None:
        ids, labels = fitted.ids, fitted.labels
        self.examples += 1
        self.input_cut += fitted.input_cut
        self.output_cut += fitted.output_cut
        self.turns_cut += fitted.turns_cut
        self.tokens += len(ids) + (len(labels) if seq2seq else 0)
        self.supervised_tokens += len(labels) - labels.count(IGNORED)
        self.longest = max(self.longest, len(ids), len(labels))
        self.notes.update(parts.notes)

    def result(self) -> EncodeStats:
        from .encoded import EncodeStats

        return EncodeStats(
            self.examples, self.input_cut, self.output_cut, self.tokens, self.supervised_tokens, self.longest,
            self.turns_cut, tuple(f"{note} ({count:,})" for note, count in self.notes.items()),
        )  # fmt: skip


def prompt_ids(
    inputs: Sequence[str | Sequence[Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq2seq: bool = False,
    max_length: int | None = None,
) -> list[list[int]]:
    """What stands before the output in training, for generation: the same ids as :func:`encode` gives an input.

    Args:
        inputs: texts, or conversations that the model is to answer (they go through the chat template, with the
            tools of a :class:`~foreword.data.examples.Conversation`).
        max_length: the most tokens of an input; a longer one loses its start.

    Raises:
        DataError: an input has no tokens, or is a conversation and the tokenizer has no chat template.
    """
    front, back = special_ids(tokenizer)
    bos = getattr(tokenizer, "bos_token_id", None)
    found = []
    for place, given in enumerate(inputs):
        name = f"input {place}"
        text = given if isinstance(given, str) else _asked(name, tokenizer, given)
        (body,) = ids_of(tokenizer, [text])
        before, after = front, back if seq2seq else []
        if not isinstance(given, str):  # the template has written the special tokens itself
            opening = 1 if body and body[0] == bos else 0
            before, body, after = body[:opening], body[opening:], []
        found.append([*before, *(body if max_length is None else _last(body, max_length)), *after])
        if not found[-1]:
            raise DataError(
                f"{name} is empty, and this tokenizer opens no text by itself; give it a text to go on from"
            )
    return found


def _asked(name: str, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str:
    tools = messages.tools if isinstance(messages, Conversation) else None
    options = messages.template if isinstance(messages, Conversation) else None
    return Chat(name, tokenizer, messages, tools, options).render(len(messages), generate=True)


# --- cutting to length ------------------------------------------------------------------------------------


def _fit_causal(example: Example, parts: Parts, max_length: int) -> _Fitted:
    room = max_length - len(parts.front)
    if room < 1:
        raise DataError(
            f"{option('max_length', max_length)} leaves no room: what opens every text, the special tokens, takes "
            f"{len(parts.front)}."
        )
    output = parts.output[:room]
    body = _last(parts.body, room - len(output))
    cut, opening = len(parts.body) - len(body), len(parts.front)
    ids = [*parts.front, *body, *output]
    labels = [IGNORED] * (opening + len(body)) + output
    # An answer that has lost its beginning, or all that stood before it, would be learned as what follows nothing.
    whole = [span for span in parts.spans if not cut or span[0] > cut]
    for start, end in whole:
        labels[opening + start - cut : opening + end - cut] = body[start - cut : end - cut]
    # A causal model predicts each token from those before it, and before the first there are none. The prefix
    # does not help: it is keys and values only, and has no position that could make the prediction.
    labels[0] = IGNORED
    if len(labels) == labels.count(IGNORED):
        raise DataError(
            f"{example.source}: nothing is left to learn: the output is one token, and no token comes before "
            f"it. Give it an input{in_python(', or use eos=True')}."
        )
    lost = len(parts.spans) - len(whole)
    return _Fitted(ids, labels, cut > 0, len(output) < len(parts.output), lost)


def _fit_seq2seq(example: Example, parts: Parts, max_length: int) -> _Fitted:
    room = max_length - len(parts.front) - len(parts.back)
    if room < 1:
        raise DataError(f"{option('max_length', max_length)} leaves no room beside the tokenizer's special tokens.")
    body = _last(parts.body, room)
    ids = [*parts.front, *body, *parts.back]
    if not ids:
        raise DataError(f"{example.source}: the input has no tokens, and an encoder cannot read nothing.")
    output = parts.output[:max_length]
    return _Fitted(ids, output, len(body) < len(parts.body), len(output) < len(parts.output))


def _last(ids: list[int], count: int) -> list[int]:
    # Not ids[-count:], which is everything when the count is 0.
    return ids[max(0, len(ids) - count) :]


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no end token, so the model could not learn where to stop. "
            f"{in_python('Set tokenizer.eos_token, or use eos=False.') or 'Use a model whose tokenizer has one.'}"
        )
    return [int(tokenizer.eos_token_id)]
