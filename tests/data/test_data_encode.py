"""Encoding: what is joined, what is supervised, and what is cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from foreword.data import EncodedDataset, EncodeStats, Example, encode
from foreword.errors import DataError

Tokenizer = PreTrainedTokenizerFast

text = st.text(st.characters(codec="utf-8"), max_size=40)
output = text.filter(bool)


def example(prompt: str, answer: str, messages: tuple[dict[str, Any], ...] | None = None) -> Example:
    return Example(prompt, answer, "file.jsonl:7", messages)


def ids_of(tokenizer: Tokenizer, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def one(tokenizer: Tokenizer, item: Example, max_length: int = 10_000, **options: Any) -> tuple[list, list]:
    encoded = encode([item], tokenizer, max_length=max_length, **options)[0]
    return encoded["input_ids"], encoded["labels"]


def conversation(*contents: str) -> Example:
    roles = itertools.cycle(("user", "assistant"))
    messages = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))
    return example("", contents[-1], messages)


# --- joining and labels -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(text.filter(bool), output)
def test_ids_are_prompt_then_output(plain: Tokenizer, prompt: str, answer: str) -> None:
    before, after = ids_of(plain, prompt), [*ids_of(plain, answer), plain.eos_token_id]
    assert one(plain, example(prompt, answer)) == (before + after, [-100] * len(before) + after)


@settings(deadline=None)
@given(text, output)
def test_bos_comes_first_and_eos_never_in_the_middle(
    with_bos: Tokenizer, bos_eos: Tokenizer, prompt: str, answer: str
) -> None:
    before, after = ids_of(with_bos, prompt), [*ids_of(with_bos, answer), with_bos.eos_token_id]
    for tokenizer in (with_bos, bos_eos):
        ids, labels = one(tokenizer, example(prompt, answer))
        assert ids == [tokenizer.bos_token_id, *before, *after]
        assert labels == [-100] * (1 + len(before)) + after


def test_the_boundary_is_not_merged(plain: Tokenizer) -> None:
    whole = ids_of(plain, "The sea")
    for cut in range(1, 7):
        prompt, answer = "The sea"[:cut], "The sea"[cut:]
        ids, _ = one(plain, example(prompt, answer), eos=False)
        assert ids == ids_of(plain, prompt) + ids_of(plain, answer)
    assert len(ids_of(plain, "The s")) + len(ids_of(plain, "ea")) > len(whole), "this cut must be inside a token"


def test_without_eos(plain: Tokenizer) -> None:
    ids, labels = one(plain, example("The", " sea"), eos=False)
    assert ids[-1] != plain.eos_token_id
    assert [label for label in labels if label != -100] == ids_of(plain, " sea")


def test_plain_text_is_supervised_but_for_what_cannot_be_predicted(plain: Tokenizer, with_bos: Tokenizer) -> None:
    ids, labels = one(plain, example("", "The sea was calm."))
    assert labels == [-100, *ids[1:]]
    ids, labels = one(with_bos, example("", "The sea was calm."))
    assert (ids[0], labels) == (with_bos.bos_token_id, [-100, *ids[1:]])


# --- cutting ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(text, output, st.integers(2, 60))
def test_cutting_keeps_the_end_of_the_input(
    plain: Tokenizer, with_bos: Tokenizer, prompt: str, answer: str, most: int
) -> None:
    for tokenizer, front in ((plain, []), (with_bos, [with_bos.bos_token_id])):
        before, after = ids_of(tokenizer, prompt), [*ids_of(tokenizer, answer), tokenizer.eos_token_id]
        data = encode([example(prompt, answer)], tokenizer, max_length=most)
        ids, labels = data[0]["input_ids"], data[0]["labels"]
        room = most - len(front)
        kept_after = after[:room]
        kept_before = before[len(before) - min(len(before), room - len(kept_after)) :]
        assert ids == front + kept_before + kept_after
        supervised = [-100] * (len(front) + len(kept_before)) + kept_after
        assert labels == [-100, *supervised[1:]]
        assert len(ids) == min(most, len(front + before + after))
        assert data.stats.input_cut == (len(kept_before) < len(before))
        assert data.stats.output_cut == (len(kept_after) < len(after))
        assert data.stats.output_cut == (ids[-1] != tokenizer.eos_token_id)


def test_statistics_add_up(plain: Tokenizer) -> None:
    items = [
        example("The sea was calm.", " x"),
        example("a", " x"),
        example("a", "Once upon a time there was"),
    ]
    data = encode(items, plain, max_length=4)
    assert isinstance(data, EncodedDataset)
    assert len(data) == 3
    ids = [item["input_ids"] for item in (data[0], data[1], data[2])]
    labels = [label for index in range(3) for label in data[index]["labels"]]
    assert data.stats == EncodeStats(
        examples=3,
        input_cut=2,
        output_cut=1,
        tokens=sum(map(len, ids)),
        supervised_tokens=len(labels) - labels.count(-100),
        longest=4,
    )


def test_describe() -> None:
    stats = EncodeStats(1200, 3, 1, 34567, 2345, 99)
    assert stats.describe() == (
        "1,200 examples, 34,567 tokens (2,345 supervised), longest 99; 3 inputs cut, 1 output cut"
    )
    stats = EncodeStats(1, 0, 0, 5, 2, 5)
    assert stats.describe() == "1 example, 5 tokens (2 supervised), longest 5; nothing cut"


def test_many_examples_keep_their_order(plain: Tokenizer) -> None:
    items = [example(f"n {i}", f"{i}") for i in range(2500)]
    data = encode(items, plain, max_length=30)
    assert len(data) == 2500
    for index in (0, 1023, 1024, 2047, 2048, 2499):
        assert plain.decode(data[index]["input_ids"]) == f"n {index}{index}<eos>"
    assert data[-1] == data[2499]
    with pytest.raises(IndexError):
        data[2500]


def test_items_are_copies(plain: Tokenizer) -> None:
    data = encode([example("a", "b")], plain, max_length=9)
    data[0]["labels"].append(3)
    assert len(data[0]["labels"]) == len(data[0]["input_ids"])


def test_long_texts_cause_no_warning(plain: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    before = plain.model_max_length
    plain.model_max_length = 8
    try:
        encode([example("The sea was calm. " * 20, "b")], plain, max_length=8)
    finally:
        plain.model_max_length = before
    assert not caplog.records


# --- seq2seq ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(text, output, st.integers(3, 40))
def test_seq2seq_cuts_both_sides_apart(bos_eos: Tokenizer, prompt: str, answer: str, most: int) -> None:
    bos, eos = bos_eos.bos_token_id, bos_eos.eos_token_id
    before, after = ids_of(bos_eos, prompt), [*ids_of(bos_eos, answer), eos]
    data = encode([example(prompt, answer)], bos_eos, max_length=most, seq2seq=True)
    ids, labels = data[0]["input_ids"], data[0]["labels"]
    assert labels == after[:most]
    assert ids == [bos, *before[max(0, len(before) - (most - 2)) :], eos]
    if len(before) + 2 <= most:
        assert ids == bos_eos(prompt)["input_ids"]
    assert data.stats.tokens == len(ids) + len(labels)
    assert data.stats.supervised_tokens == len(labels)
    assert (data.stats.input_cut, data.stats.output_cut) == (len(before) + 2 > most, len(after) > most)


def test_seq2seq_refuses_an_input_without_tokens(plain: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"file\.jsonl:7: the input has no tokens"):
        one(plain, example("", "a"), seq2seq=True)


# --- conversations ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(text.filter(str.strip), output.filter(str.strip))
def test_a_conversation_learns_all_answers_or_the_last_and_their_ends(
    chat: Tokenizer, question: str, answer: str
) -> None:
    first, second = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n", "Hello.<|im_end|>"
    third = f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    before, after = ids_of(chat, first + second + third), ids_of(chat, f"{answer}<|im_end|>")
    ids, labels = one(chat, conversation("Hi.", "Hello.", question, answer), turns="last")
    assert ids == before + after
    assert labels == [-100] * len(before) + after
    ids, labels = one(chat, conversation("Hi.", "Hello.", question, answer))
    start, end = len(ids_of(chat, first)), len(ids_of(chat, first + second))
    assert ids == before + after
    assert labels == [-100] * start + ids[start:end] + [-100] * (len(before) - end) + after
    assert labels[-1] == chat.convert_tokens_to_ids("<|im_end|>")


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    changed = Tokenizer(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")
    changed.chat_template = template
    return changed


def test_eos_is_added_only_when_the_template_ends_nothing(with_bos: Tokenizer) -> None:
    bare = with_template(
        with_bos,
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    item = conversation("Hi?", " Hello. ")
    ids, labels = one(bare, item)
    assert ids[: ids.index(bare.bos_token_id) + 1] == [bare.bos_token_id]
    assert ids.count(bare.bos_token_id) == 1, "the template wrote BOS, so the tokenizer must not"
    assert bare.decode([label for label in labels if label != -100]) == " Hello.<eos>"
    _, labels = one(bare, item, eos=False)
    assert bare.decode([label for label in labels if label != -100]) == " Hello."


def test_a_cut_conversation_keeps_bos_and_the_end_of_the_prompt(with_bos: Tokenizer) -> None:
    template = with_template(
        with_bos, "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    item = conversation("The sea was calm, and the house was old.", "x")
    whole, _ = one(template, item)
    data = encode([item], template, max_length=7)
    assert data[0]["input_ids"] == [whole[0], *whole[-6:]]
    assert data[0]["labels"] == [-100] * 5 + whole[-2:]
    assert data.stats.input_cut == 1


def test_templates_that_do_not_fit_are_refused(plain: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"file\.jsonl:7: .* no chat template"):
        one(plain, conversation("a", "b"))
    cases = {
        "{{ messages | length }}{{ messages[-1]['content'] }}": "does not simply continue",
        "{{ messages[0]['content'] }}": "does not simply continue",
        "{{ raise_exception('roles must alternate') }}": "refuses this conversation: roles must alternate",
        "{{ messages[0].content.nothing.here }}": "refuses this conversation",
    }
    for template, words in cases.items():
        with pytest.raises(DataError, match=rf"file\.jsonl:7: .*{words}"):
            one(with_template(plain, template), conversation("a", "b"))


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 0, -5, True, 2.5])
def test_max_length_must_be_sensible(plain: Tokenizer, most: Any) -> None:
    with pytest.raises(DataError, match="max_length must be"):
        encode([example("a", "b")], plain, max_length=most)


def test_max_length_must_leave_room_for_special_tokens(bos_eos: Tokenizer) -> None:
    assert one(bos_eos, example("a", "b"), max_length=2)[0] == [bos_eos.bos_token_id, *ids_of(bos_eos, "b")]
    with pytest.raises(DataError, match="leaves no room"):
        one(bos_eos, example("a", "b"), max_length=2, seq2seq=True)


def test_nothing_to_learn_is_refused(plain: Tokenizer) -> None:
    with pytest.raises(DataError, match="no examples"):
        encode([], plain, max_length=9)
    for eos in (True, False):
        with pytest.raises(DataError, match=r"file\.jsonl:7: the output has no tokens"):
            one(plain, example("a", ""), eos=eos)
    assert len(ids_of(plain, "x")) == 1
    with pytest.raises(DataError, match=r"file\.jsonl:7: nothing is left to learn"):
        one(plain, example("", "x"), eos=False)
    assert one(plain, example("", "x"))[1] == [-100, plain.eos_token_id]


def test_a_tokenizer_without_end_token(plain: Tokenizer) -> None:
    endless = Tokenizer(tokenizer_object=plain.backend_tokenizer)
    with pytest.raises(DataError, match="no end token"):
        one(endless, example("a", "b"))
    assert one(endless, example("a", "b"), eos=False)[0] == ids_of(plain, "a") + ids_of(plain, "b")
