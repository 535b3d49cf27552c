"""Showing a batch as the model will see it.

Tokens are parted by ``│``. Runs that the loss is computed on stand in ``⟦ ⟧``, and are coloured too.
Padding is counted, as in ``pad×12``, and line ends are drawn as ``⏎``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_IGNORED = -100
_STYLES = {"plain": "", "supervised": "bold green", "padding": "dim"}
_DRAWN = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def show_batch(batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> Group:
    """Return the batch for a rich console, one text per row.

    Args:
        batch: What a ``Collator`` returns: ``input_ids`` of shape (n, length) and, where there are any,
            ``attention_mask`` and ``labels``. When the labels are not the ids themselves, as in seq2seq, each
            row has a second text for them, after ``→``.
        tokenizer: The tokenizer that made the ids.
    """
    return Group(*_rows(batch, tokenizer))


def batch_text(batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the same as ``show_batch`` without colour, for logs and tests."""
    return "\n".join(row.plain for row in _rows(batch, tokenizer))


def _rows(batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> Iterator[Text]:
    inputs: list[list[int]] = batch["input_ids"].tolist()
    masks = batch["attention_mask"].tolist() if "attention_mask" in batch else [[1] * len(ids) for ids in inputs]
    labels = batch["labels"].tolist() if "labels" in batch else [[_IGNORED] * len(ids) for ids in inputs]
    apart = not _labels_are_ids(inputs, labels)
    width = len(str(len(inputs)))
    for number, (ids, mask, targets) in enumerate(zip(inputs, masks, labels, strict=True), start=1):
        marks = [_IGNORED] * len(ids) if apart else targets
        kinds = [
            ("supervised" if mark != _IGNORED else "plain") if real else "padding"
            for real, mark in zip(mask, marks, strict=True)
        ]
        yield _row(f"{number:>{width}}  ", ids, kinds, tokenizer)
        if apart:
            kinds = ["padding" if target == _IGNORED else "supervised" for target in targets]
            yield _row(f"{'→':>{width}}  ", targets, kinds, tokenizer)


def _labels_are_ids(inputs: list[list[int]], labels: list[list[int]]) -> bool:
    return all(
        len(ids) == len(targets)
        and all(target in (_IGNORED, token) for token, target in zip(ids, targets, strict=True))
        for ids, targets in zip(inputs, labels, strict=True)
    )


def _row(label: str, ids: list[int], kinds: list[str], tokenizer: PreTrainedTokenizerBase) -> Text:
    text = Text(label, overflow="fold")
    first = True
    for kind, run in groupby(zip(ids, kinds, strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in run]
        if kind == "padding":
            text.append(f"{'' if first else ' '}pad×{len(tokens)}", style=_STYLES[kind])
        else:
            text.append("" if first or kind == "supervised" or text.plain.endswith("⟧") else "│", style="dim")
            _append_tokens(text, tokens, kind, tokenizer)
        first = False
    return text


def _append_tokens(text: Text, tokens: list[int], kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    opening, closing = ("⟦", "⟧") if kind == "supervised" else ("", "")
    text.append(opening, style=_STYLES[kind])
    for index, token in enumerate(tokens):
        if index:
            text.append("│", style="dim")
        text.append(_drawn(token, tokenizer), style=_STYLES[kind])
    text.append(closing, style=_STYLES[kind])


def _drawn(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return one token as visible text."""
    try:
        name = tokenizer.convert_ids_to_tokens(token)
    except (IndexError, KeyError, OverflowError, TypeError):
        name = None
    if not isinstance(name, str):
        return f"<id {token}>"
    if "▁" in name:
        # Sentencepiece marks spaces this way, and decoding one token alone would drop the leading one.
        shown = name.replace("▁", " ")
    else:
        shown = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        # Part of a character decodes to a replacement sign; the token's own name tells more.
        shown = name if "\ufffd" in shown else shown
    return "".join(_visible(character) for character in shown)


def _visible(character: str) -> str:
    # Anything that does not print is spelled out, which also keeps escape codes away from the terminal.
    if character in _DRAWN:
        return _DRAWN[character]
    return character if character.isprintable() else f"\\u{ord(character):04x}"
