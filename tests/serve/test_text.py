"""Text as it comes: put together it is the decoded tokens up to the first stop text, and nothing is taken back."""

from __future__ import annotations

import engines
import pytest
from engines import engine, greedy, prompt
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import zoo
from foreword.serve._text import Text


def _bytes():
    """One token a byte: characters of several bytes come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


BYTES, WORDS = _bytes(), zoo.tokenizer()


def written(tokenizer, tokens, stops=()):
    """The pieces, and whether a stop text came."""
    text = Text(tokenizer, stops)
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            return pieces, True
    pieces.append(text.end())
    return pieces, text.stopped


def cut(whole, stops):
    """Up to the first stop text that is whole as characters come one by one."""
    ends = [(i + len(s), i) for s in stops if (i := whole.find(s)) >= 0]
    return whole[: min(ends)[1]] if ends else whole


@given(st.text(max_size=60))
def test_characters_of_several_bytes_come_whole(text):
    tokens = BYTES(text)["input_ids"]
    pieces, _ = written(BYTES, tokens)
    assert "".join(pieces) == BYTES.decode(tokens)
    for piece in pieces:
        assert "\ufffd" not in piece or "\ufffd" in text


@given(st.lists(st.integers(0, 98), max_size=120))
def test_any_tokens_are_what_decode_makes_of_them(tokens):
    pieces, _ = written(WORDS, tokens)
    whole = WORDS.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces) == whole


@given(st.text("abc ", max_size=40), st.lists(st.text("abc ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_texts_end_an_answer_before_them(text, stops):
    pieces, stopped = written(BYTES, BYTES(text)["input_ids"], stops)
    got = "".join(pieces)
    assert stopped == any(s in text for s in stops) and text.startswith(got)
    assert not any(s in got for s in stops)
    if stopped:
        ends = min(text.find(s) + len(s) for s in stops if s in text)
        starts = min(text.find(s) for s in stops if s in text[:ends])
        assert got == text[:starts]
    else:
        assert got == text


def test_what_may_be_a_stop_text_is_held_back():
    text, pieces = Text(BYTES, ["END", "\n\n"]), []
    for token in BYTES("a ENE b\nEND c")["input_ids"]:
        pieces.append(text.add(token))
        if text.stopped:
            break
    assert pieces == ["a", " ", "", "", "EN", "E ", "b", "", "\n", "", ""] and text.stopped


def test_bytes_that_never_become_a_character_do_not_wait_for_ever():
    broken = BYTES.convert_tokens_to_ids(BYTES.convert_ids_to_tokens(BYTES("é")["input_ids"])[0])
    pieces, _ = written(BYTES, [broken] * 100)
    assert "".join(pieces) == BYTES.decode([broken] * 100)
    assert sum(bool(p) for p in pieces) > 3


@pytest.mark.parametrize("position", [1, 4, 9])
def test_the_engine_stops_at_stop_texts_and_tokens(position):
    held = engines.library()
    with engine(held) as made:
        whole = made.generate([prompt(6)], greedy(14), "long")[0][0]
        pieces = [zoo.tokenizer().decode([t]) for t in whole.tokens]
        stop = "".join(pieces[position : position + 2])
        got = made.generate([prompt(6)], greedy(14, stop=(stop,)), "long")[0][0]
        assert got.finish == "stop" and got.text == whole.text[: whole.text.find(stop)]
        assert got.tokens == whole.tokens[: len(got.tokens)] and len(got.tokens) < 14
        token = whole.tokens[position]
        first = whole.tokens.index(token)
        got = made.generate([prompt(6)], greedy(14, stop_tokens=(token,)), "long")[0][0]
        assert got.finish == "stop" and got.tokens == whole.tokens[: first + 1]
        assert got.text == zoo.tokenizer().decode(whole.tokens[:first])
        assert whole.finish == "length" and whole.text == zoo.tokenizer().decode(whole.tokens)


def test_the_models_own_end_can_be_ignored():
    held = engines.library()
    with engine(held) as made:
        whole = made.generate([prompt(6)], greedy(10), "long")[0][0]
    held.model.generation_config.eos_token_id = [whole.tokens[3], 127]
    with engine(held) as made:
        ended = made.generate([prompt(6)], greedy(10), "long")[0][0]
        ignored = made.generate([prompt(6)], greedy(10, ignore_eos=True), "long")[0][0]
    first = whole.tokens.index(whole.tokens[3])
    assert ended.finish == "stop" and ended.tokens == whole.tokens[: first + 1]
    assert ignored.finish == "length" and ignored.tokens == whole.tokens
