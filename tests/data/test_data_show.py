"""Showing a batch: every token apart, the supervised ones marked, nothing that does not print."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from foreword.data import Collator, Example, batch_text, encode, show_batch

plain_letters = st.text(st.sampled_from("abc ehtx."), min_size=1, max_size=12)


def batch_of(tokenizer: PreTrainedTokenizerFast, *pairs: tuple[str, str], seq2seq: bool = False) -> dict:
    examples = [Example(prompt, answer, "list[0]") for prompt, answer in pairs]
    data = encode(examples, tokenizer, max_length=200, seq2seq=seq2seq)
    return Collator.for_tokenizer(tokenizer, seq2seq=seq2seq)([data[i] for i in range(len(data))])


def test_tokens_marks_and_padding(with_bos: PreTrainedTokenizerFast) -> None:
    batch = batch_of(with_bos, ("qz", "zq"), ("qzqz\n", "q\tzqz"))
    assert batch_text(batch, with_bos).split("\n") == [
        "1  <bos>│q│z⟦z│q│<eos>⟧ pad×6",
        "2  <bos>│q│z│q│z│⏎⟦q│⇥│z│q│z│<eos>⟧",
    ]


def test_seq2seq_shows_both_sides(bos_eos: PreTrainedTokenizerFast) -> None:
    batch = batch_of(bos_eos, ("qz", "z"), ("q", "zq"), seq2seq=True)
    assert batch_text(batch, bos_eos).split("\n") == [
        "1  <bos>│q│z│<eos>",
        "→  ⟦z│<eos>⟧ pad×1",
        "2  <bos>│q│<eos> pad×1",
        "→  ⟦z│q│<eos>⟧",
    ]


def test_without_labels_nothing_is_marked(plain: PreTrainedTokenizerFast) -> None:
    ids = torch.tensor([plain("qzq")["input_ids"]])
    assert batch_text({"input_ids": ids}, plain) == "1  q│z│q"


def test_padding_on_the_left_and_gaps_in_the_labels(plain: PreTrainedTokenizerFast) -> None:
    q, z = plain.convert_tokens_to_ids(["q", "z"])
    batch = {
        "input_ids": torch.tensor([[0, 0, q, z, q, z]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, q, -100, q, -100]]),
    }
    assert batch_text(batch, plain) == "1  pad×2⟦q⟧z⟦q⟧z"


@settings(deadline=None)
@given(st.lists(st.tuples(plain_letters, plain_letters), min_size=1, max_size=4))
def test_the_texts_can_be_read_back(plain: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> None:
    lines = batch_text(batch_of(plain, *pairs), plain).split("\n")
    assert len(lines) == len(pairs)
    for line, (prompt, answer) in zip(lines, pairs, strict=True):
        before, marked = line[3:].split(" pad×")[0].split("⟦")
        assert before.replace("│", "") == prompt
        assert marked.replace("│", "") == f"{answer}<eos>⟧"


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_nothing_unprintable_is_shown(plain: PreTrainedTokenizerFast, string: str) -> None:
    shown = batch_text(batch_of(plain, ("a", string)), plain)
    assert "\n" not in shown
    assert all(character.isprintable() for character in shown)


def test_escape_codes_do_not_reach_the_terminal(plain: PreTrainedTokenizerFast) -> None:
    assert "\\u001b│[" in batch_text(batch_of(plain, ("\x1b[31m", "x")), plain)


def test_part_of_a_character_shows_its_own_name(plain: PreTrainedTokenizerFast) -> None:
    (row,) = batch_text(batch_of(plain, ("é", "x")), plain).split("\n")
    assert row == "1  Ã│©⟦x│<eos>⟧"


def test_sentencepiece_spaces_and_unknown_ids() -> None:
    words = Tokenizer(models.WordLevel({"▁the": 0, "▁sea": 1, "s": 2}, unk_token="s"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert batch_text({"input_ids": torch.tensor([[0, 1, 2, 77]])}, tokenizer) == "1   the│ sea│s│<id 77>"


def printed(tokenizer: PreTrainedTokenizerFast, batch: dict, *, colour: bool, width: int = 200) -> str:
    file = io.StringIO()
    system = "truecolor" if colour else None
    Console(file=file, force_terminal=colour, color_system=system, width=width).print(show_batch(batch, tokenizer))
    return file.getvalue()


def test_on_a_console(with_bos: PreTrainedTokenizerFast) -> None:
    batch = batch_of(with_bos, ("[bold]q", "[red]z"), ("q", "z"))
    assert printed(with_bos, batch, colour=False).rstrip("\n") == batch_text(batch, with_bos)
    coloured = printed(with_bos, batch, colour=True)
    assert "\x1b[1;32m⟦" in coloured, "supervised tokens are green"
    assert "\x1b[2m pad×" in coloured, "padding is dim"


@pytest.mark.parametrize("width", [10, 23])
def test_a_narrow_console_loses_no_token(plain: PreTrainedTokenizerFast, width: int) -> None:
    batch = batch_of(plain, ("The sea was calm, and the house was old.", " Once upon a time."))
    squeezed = printed(plain, batch, colour=False, width=width)
    assert max(map(len, squeezed.split("\n"))) <= width
    assert "".join(squeezed.split()) == "".join(batch_text(batch, plain).split())
