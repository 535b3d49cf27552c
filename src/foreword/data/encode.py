"""Turning examples into token ids and labels.

The input and the output are tokenised apart and joined as ids. Joined as text, the last letters of the input
and the first of the output could merge into one token, which would be in the prompt in training but never in
generation.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .encoded import EncodedDataset, EncodeStats

IGNORED = -100
_CHUNK = 1024


def __getattr__(name: str) -> Any:
    # EncodedDataset needs torch. Reading examples does not, and this module is imported along with that.
    if name in ("EncodedDataset", "EncodeStats"):
        from . import encoded

        return getattr(encoded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class _Parts:
    """One example as ids: what stays in front, what may be cut, what stays behind it, and the output."""

    front: list[int]
    body: list[int]
    back: list[int]
    output: list[int]


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seq2seq: bool = False,
    eos: bool = True,
) -> EncodedDataset:
    """Tokenise examples for training, with the loss on the output only.

    For a causal model the ids are the tokenizer's opening special tokens (BOS, if it adds one), the input,
    the output and the end token; the labels are -100 up to the output. The first id is never supervised,
    because nothing before it could predict it. For seq2seq the ids are the input with the tokenizer's usual
    special tokens, and the labels are the output and the end token.

    A conversation goes through the chat template: the prompt is everything before the last answer, and the
    output is what the template writes after it, down to its own end-of-turn token.

    What is too long loses the start of its input. When the output alone does not fit, it loses its end, the
    end token first. The statistics count both.

    Args:
        examples: At least one.
        tokenizer: A transformers tokenizer.
        max_length: The most tokens in a sequence; with seq2seq, in the input and in the output separately.
        seq2seq: Encode for an encoder-decoder model.
        eos: End the output with the end token. A template that ends its turns itself is not affected.

    Raises:
        DataError: If there are no examples, ``max_length`` is below 2 or leaves no room beside the special
            tokens, the tokenizer lacks an end token or a chat template that is needed, or an example leaves
            nothing to learn.
    """
    from .encoded import EncodedDataset

    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise DataError(f"max_length must be a whole number of at least 2; it is {max_length!r}.")
    if not examples:
        raise DataError("There are no examples to encode.")
    end = _end_ids(tokenizer) if eos else []
    fit = _fit_seq2seq if seq2seq else _fit_causal
    stats = _Counter()
    input_ids: list[array[int]] = []
    labels: list[array[int]] = []
    for example, parts in _tokenised(examples, tokenizer, end):
        if not parts.output or parts.output == end:
            raise DataError(f"{example.source}: the output has no tokens, so there is nothing to learn from it.")
        ids, targets, input_cut, output_cut = fit(example, parts, max_length)
        stats.add(ids, targets, input_cut, output_cut, seq2seq)
        input_ids.append(array("i", ids))
        labels.append(array("i", targets))
    return EncodedDataset(input_ids, labels, stats.result())


@dataclass(slots=True)
class _Counter:
    examples: int = 0
    input_cut: int = 0
    output_cut: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0

    def add(self, ids: list[int], labels: list[int], input_cut: bool, output_cut: bool, seq2seq: bool) -> None:
        self.examples += 1
        self.input_cut += input_cut
        self.output_cut += output_cut
        self.tokens += len(ids) + (len(labels) if seq2seq else 0)
        self.supervised_tokens += len(labels) - labels.count(IGNORED)
        self.longest = max(self.longest, len(ids), len(labels))

    def result(self) -> EncodeStats:
        from .encoded import EncodeStats

        return EncodeStats(
            self.examples, self.input_cut, self.output_cut, self.tokens, self.supervised_tokens, self.longest
        )


def prompt_ids(
    inputs: Sequence[str | Sequence[Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq2seq: bool = False,
    max_length: int | None = None,
) -> list[list[int]]:
    """What stands before the output in training, for generation: the same ids as :func:`encode` gives an input.

    Args:
        inputs: texts, or conversations that the model is to answer (they go through the chat template).
        max_length: the most tokens of an input; a longer one loses its start.

    Raises:
        DataError: an input has no tokens, or is a conversation and the tokenizer has no chat template.
    """
    front, back = _special_ids(tokenizer)
    bos = getattr(tokenizer, "bos_token_id", None)
    found = []
    for place, given in enumerate(inputs):
        name = f"input {place}"
        text = given if isinstance(given, str) else _rendered(name, tokenizer, given, generate=True)
        (body,) = _ids(tokenizer, [text])
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


# --- cutting to length ------------------------------------------------------------------------------------


def _fit_causal(example: Example, parts: _Parts, max_length: int) -> tuple[list[int], list[int], bool, bool]:
    room = max_length - len(parts.front)
    if room < 1:
        raise DataError(
            f"max_length={max_length} leaves no room: what opens every text, the special tokens, takes "
            f"{len(parts.front)}."
        )
    output = parts.output[:room]
    body = _last(parts.body, room - len(output))
    ids = [*parts.front, *body, *output]
    labels = [IGNORED] * (len(parts.front) + len(body)) + output
    # A causal model predicts each token from those before it, and before the first there are none. The prefix
    # does not help: it is keys and values only, and has no position that could make the prediction.
    labels[0] = IGNORED
    if len(labels) == labels.count(IGNORED):
        raise DataError(
            f"{example.source}: nothing is left to learn: the output is one token, and no token comes before "
            "it. Give it an input, or use eos=True."
        )
    return ids, labels, len(body) < len(parts.body), len(output) < len(parts.output)


def _fit_seq2seq(example: Example, parts: _Parts, max_length: int) -> tuple[list[int], list[int], bool, bool]:
    room = max_length - len(parts.front) - len(parts.back)
    if room < 1:
        raise DataError(f"max_length={max_length} leaves no room beside the tokenizer's special tokens.")
    body = _last(parts.body, room)
    ids = [*parts.front, *body, *parts.back]
    if not ids:
        raise DataError(f"{example.source}: the input has no tokens, and an encoder cannot read nothing.")
    output = parts.output[:max_length]
    return ids, output, len(body) < len(parts.body), len(output) < len(parts.output)


def _last(ids: list[int], count: int) -> list[int]:
    # Not ids[-count:], which is everything when the count is 0.
    return ids[max(0, len(ids) - count) :]


# --- tokenising -------------------------------------------------------------------------------------------


def _tokenised(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, end: list[int]
) -> Iterator[tuple[Example, _Parts]]:
    """Yield every example with its parts, tokenising many at a time."""
    front, back = _special_ids(tokenizer)
    bos = getattr(tokenizer, "bos_token_id", None)
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        texts = [_texts(example, tokenizer) for example in chunk]
        prompts = _ids(tokenizer, [text.prompt for text in texts])
        outputs = _ids(tokenizer, [text.output for text in texts])
        for example, text, prompt, output in zip(chunk, texts, prompts, outputs, strict=True):
            parts = _Parts(front, prompt, back, output if text.ended else output + end)
            if example.messages is not None:
                # The template has written the special tokens itself. If it opens with BOS, cutting keeps it.
                opening = 1 if prompt and prompt[0] == bos else 0
                parts = replace(parts, front=prompt[:opening], body=prompt[opening:], back=[])
            yield example, parts


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Not verbose: the warning about sequences that are too long would be wrong, since they are cut here.
    return list(
        tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text."""
    for probe in ("x", "a", "1", "."):
        plain = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        full = list(tokenizer(probe)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            # A probe that the vocabulary lacks may have no tokens, and then cannot part front from back.
            if plain and full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
    return [], []


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no end token, so the model could not learn where to stop. Set "
            "tokenizer.eos_token, or use eos=False."
        )
    return [int(tokenizer.eos_token_id)]


# --- conversations ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Texts:
    prompt: str
    output: str
    ended: bool


def _texts(example: Example, tokenizer: PreTrainedTokenizerBase) -> _Texts:
    """Return the prompt and output as text, and whether the output holds its own end."""
    if example.messages is None:
        return _Texts(example.input, example.output, ended=False)
    prompt = _rendered(example.source, tokenizer, example.messages[:-1], generate=True)
    whole = _rendered(example.source, tokenizer, example.messages, generate=False)
    rest = whole.removeprefix(prompt)
    # Templates often strip the content, so the stripped one is looked for.
    before, found, after = rest.partition(example.output.strip())
    if not whole.startswith(prompt) or not found:
        raise DataError(
            f"{example.source}: with the answer, the chat template does not simply continue the prompt, so "
            "the answer cannot be told apart from it. Use another template, or "
            "give the data as input and output."
        )
    if after.strip():
        # A newline after the end token belongs to the next turn; generation stops before it.
        return _Texts(prompt, rest.rstrip(), ended=True)
    return _Texts(prompt, before + found, ended=False)


def _rendered(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    generate: bool,
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{source}: the example is a conversation, but the tokenizer has no chat template. Set "
            "tokenizer.chat_template, or give the data as input and output."
        )
    try:
        plain = [dict(m) for m in messages]
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate))
    except Exception as error:  # a template may raise anything, from its own complaints to type errors
        raise DataError(f"{source}: the chat template refuses this conversation: {error}") from error
