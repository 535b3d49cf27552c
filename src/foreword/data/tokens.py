"""Examples as token ids in parts: what may be cut, what is learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ._example import Example
from .chat import Answers, Turns, answers
from .template import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Parts:
    """One example as ids: what stays in front, what may be cut, what stays behind it, and the output.

    Attributes:
        spans: Earlier answers in ``body`` that are learned as well, first and last token.
        notes: What is not learned of the example, or not read by the model, in words.
    """

    front: list[int]
    body: list[int]
    back: list[int]
    output: list[int]
    spans: tuple[Span, ...] = ()
    notes: tuple[str, ...] = ()


def tokenised(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    end: list[int],
    turns: Turns = "all",
    *,
    seq2seq: bool = False,
) -> Iterator[tuple[Example, Parts]]:
    """Yield every example with its parts, tokenising many at a time.

    Args:
        end: the ids that end an output whose template doesn't end it.

    Raises:
        DataError: a conversation can't be rendered, or its answers can't be found.
    """
    front, back = special_ids(tokenizer)
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        chats = [answers(e, tokenizer, "last" if seq2seq else turns) if e.messages is not None else None for e in chunk]
        texts = [
            (e.input, e.output) if c is None else (c.text[: c.spans[-1][0]], c.text[c.spans[-1][0] :])
            for e, c in zip(chunk, chats, strict=True)
        ]
        prompts = ids_of(tokenizer, [prompt for prompt, _ in texts])
        outputs = ids_of(tokenizer, [output for _, output in texts])
        for example, chat, prompt, output in zip(chunk, chats, prompts, outputs, strict=True):
            if chat is None:
                yield example, _of_pair(example, tokenizer, front, back, prompt, output + end, seq2seq)
            else:
                whole = output if chat.ended else output + end
                yield example, _of_chat(example, tokenizer, chat, prompt, whole, seq2seq)


def _of_pair(
    example: Example, tokenizer: PreTrainedTokenizerBase, front: list[int], back: list[int], prompt: list[int],
    output: list[int], seq2seq: bool,
) -> Parts:  # fmt: skip
    if example.layout != "pair" or front or prompt or seq2seq:
        return Parts(front, prompt, back, output)
    if (bos := getattr(tokenizer, "bos_token_id", None)) is not None:
        return Parts([bos], prompt, back, output)
    note = "inputs are empty and the tokenizer has no BOS token, so the first token of their outputs is not learned"
    return Parts(front, prompt, back, output, notes=(note,))


def _of_chat(
    example: Example, tokenizer: PreTrainedTokenizerBase, chat: Answers, prompt: list[int], output: list[int],
    seq2seq: bool,
) -> Parts:  # fmt: skip
    notes = []
    if chat.skipped:
        notes.append("conversations have answers that are not learned: blank ones, or with nothing before them")
    if chat.unwritten:
        notes.append("conversations have reasoning before the last answer, which the chat template leaves out")
    if example.tools and not all(_tool_name(tool) in chat.text for tool in example.tools):
        notes.append("conversations have tools that the chat template does not write")
    if seq2seq and sum(m["role"] == "assistant" for m in example.messages or ()) > 1:
        notes.append("conversations have several answers, and an encoder-decoder model learns the last one")
    prompt, spans = _earlier(tokenizer, chat, prompt)
    # The template has written the special tokens itself. If it opens with BOS, cutting keeps it.
    opening = 1 if prompt and prompt[0] == getattr(tokenizer, "bos_token_id", None) else 0
    spans = tuple((start - opening, end - opening) for start, end in spans)
    return Parts(prompt[:opening], prompt[opening:], [], output, spans, tuple(notes))


def _tool_name(tool: object) -> str:
    inner = tool.get("function", tool) if isinstance(tool, dict) else {}
    return str(inner.get("name", "")) if isinstance(inner, dict) else ""


def _earlier(
    tokenizer: PreTrainedTokenizerBase, chat: Answers, prompt: list[int]
) -> tuple[list[int], tuple[Span, ...]]:
    """The answers before the last, as tokens of the prompt.

    Where the pieces between beginnings and ends of answers, tokenised apart, are the prompt's own tokens, these are
    kept. Otherwise a token reaches over a boundary; then the pieces' tokens are taken, as for the last answer, so that
    what is learned is what the model would write.
    """
    *spans, (last, _) = chat.spans
    if not spans:
        return prompt, ()
    cuts = [0, *(cut for span in spans for cut in span), last]
    pieces = ids_of(tokenizer, [chat.text[a:b] for a, b in pairwise(cuts)])
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    found = tuple((ends[2 * i + 1], ends[2 * i + 2]) for i in range(len(spans)))
    joined = [token for piece in pieces for token in piece]
    if joined != prompt and (proved := _by_prefixes(tokenizer, chat.text, spans, prompt)) is not None:
        return prompt, proved
    return joined, found


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], prompt: list[int]
) -> tuple[Span, ...] | None:
    """The spans as tokens of the prompt, if its tokens up to each boundary are those of the text up to there."""
    starts = ids_of(tokenizer, [text[:start] for start, _ in spans])
    ends = ids_of(tokenizer, [text[:end] for _, end in spans])
    if not all(prompt[: len(ids)] == ids for ids in (*starts, *ends)):
        return None
    return tuple((len(a), len(b)) for a, b in zip(starts, ends, strict=True))


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Each text's ids, without special tokens but those that are written in it."""
    # Not verbose: the warning about sequences that are too long would be wrong, since they are cut later.
    return list(
        tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text."""
    for probe in ("x", "a", "1", "."):
        plain = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        full = list(tokenizer(probe)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            # A probe that the vocabulary lacks may have no tokens, and then cannot part front from back.
            if plain and full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
    return [], []
