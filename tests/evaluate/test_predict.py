"""What is written: each row as alone, the same again, ended where it should, from the tokens of training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.data import encode, read_examples
from foreword.data.encode import prompt_ids
from foreword.errors import ConfigError, DataError
from foreword.evaluate.predict import Decoding, batches, predict

INPUTS = ["The film", "There is a place in the city centre that", "Write a glowing", "a", "The acting is good and the"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


def alone(model, tokenizer, text, **options):
    """generate on one row, without padding."""
    ids = torch.tensor(prompt_ids([text], tokenizer, seq2seq=model.config.is_encoder_decoder))
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=2, **options)
    return tokenizer.decode(out[0, 0 if model.config.is_encoder_decoder else ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_each_row_is_what_generate_writes_for_it_alone(name, beams):
    model, tokenizer = zoo.build(name).eval(), zoo.tokenizer()
    settings_ = Decoding(max_new_tokens=7, beams=beams)
    found = predict(model, tokenizer, INPUTS, settings=settings_, batch_size=2)
    plain = {"max_new_tokens": 7, "num_beams": beams, "do_sample": False}
    assert found == [alone(model, tokenizer, t, **plain) for t in INPUTS]


@given(st.lists(st.sampled_from(INPUTS), min_size=1, max_size=6), st.integers(1, 6))
@settings(max_examples=15)
def test_greedy_texts_do_not_depend_on_the_batch(texts, batch_size):
    model, tokenizer = zoo.build("llama").eval(), zoo.tokenizer()
    once = predict(model, tokenizer, texts, settings=Decoding(max_new_tokens=5), batch_size=batch_size)
    assert once == [predict(model, tokenizer, [t], settings=Decoding(max_new_tokens=5))[0] for t in texts]


def test_drawing_is_the_same_again_whatever_was_drawn_before():
    model, tokenizer = zoo.build("llama").eval(), zoo.tokenizer()
    how = Decoding(sample=True, temperature=1.5, max_new_tokens=9)
    first = list(batches(model, tokenizer, INPUTS, settings=how, batch_size=2))
    torch.rand(7)
    state = torch.random.get_rng_state()
    later = list(batches(model, tokenizer, INPUTS, settings=how, batch_size=2, skip={0}))
    assert later == first[1:] and torch.equal(state, torch.random.get_rng_state())
    other = Decoding(sample=True, temperature=1.5, max_new_tokens=9, seed=1)
    assert [b.texts for b in batches(model, tokenizer, INPUTS, settings=other, batch_size=2)] != [
        b.texts for b in first
    ]
    assert sorted(r for b in first for r in b.rows) == list(range(len(INPUTS)))


def test_a_prefix_counts_and_modes_come_back():
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    model.train()
    plain = predict(model, tokenizer, INPUTS, settings=Decoding(max_new_tokens=6))
    tuning = fw.attach(model, fw.PrefixConfig(length=5, init="random", seed=3))
    with torch.no_grad():
        for p in tuning.parameters():
            p.mul_(30)
    prefixed = predict(model, tokenizer, INPUTS, settings=Decoding(max_new_tokens=6))
    tuning.detach()
    assert model.training and prefixed != plain
    assert predict(model, tokenizer, INPUTS, settings=Decoding(max_new_tokens=6)) == plain


def test_texts_end_before_the_stop_text():
    model, tokenizer = zoo.build("llama").eval(), zoo.tokenizer()
    whole = predict(model, tokenizer, INPUTS, settings=Decoding(max_new_tokens=12))
    stop = whole[1][len(whole[1]) // 2 :][:2]
    for beams in (1, 2):
        uncut = predict(model, tokenizer, INPUTS, settings=Decoding(max_new_tokens=12, beams=beams))
        found = predict(model, tokenizer, INPUTS, settings=Decoding(max_new_tokens=12, beams=beams, stop=stop))
        assert found == [t.partition(stop)[0] for t in uncut]
    never = Decoding(max_new_tokens=12, stop="\n")  # no token of this vocabulary has a line end
    assert predict(model, tokenizer, INPUTS, settings=never) == whole


@pytest.mark.parametrize("whose", ["tokenizer", "model"])
def test_texts_end_at_the_tokenizers_end_token_and_at_the_models(whose):
    """Training ends outputs with the tokenizer's; a model's own generation settings may name others."""
    model, tokenizer = zoo.build("llama").eval(), zoo.tokenizer()
    ids = torch.tensor(prompt_ids([INPUTS[1]], tokenizer))
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=2)
    new = out[0, ids.shape[1] :].tolist()
    end = new[4]
    if whose == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    else:
        model.generation_config.eos_token_id = [2, end]
    expected = tokenizer.decode(new[: new.index(end)])
    found = predict(model, tokenizer, [INPUTS[1]], settings=Decoding(max_new_tokens=10))[0]
    assert found in (expected, expected + tokenizer.decode([end]))  # a special token is not part of the text
    assert len(found) < len(tokenizer.decode(new))


@pytest.mark.parametrize("seq2seq", [False, True])
def test_the_prompt_is_what_training_has_before_the_output(seq2seq):
    tokenizer = zoo.tokenizer()
    rows = [{"input": t, "output": "fine"} for t in INPUTS]
    data = encode(read_examples(rows), tokenizer, max_length=100, seq2seq=seq2seq)
    found = prompt_ids(INPUTS, tokenizer, seq2seq=seq2seq)
    for item, ids in zip(data, found, strict=True):
        before = item["input_ids"] if seq2seq else [
            i for i, y in zip(item["input_ids"], item["labels"], strict=True) if y == -100
        ]  # fmt: skip
        assert before == ids


def test_a_conversation_goes_through_the_template_as_in_training():
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]
    (item,) = encode(read_examples([{"messages": messages}]), tokenizer, max_length=100)
    before = [i for i, y in zip(item["input_ids"], item["labels"], strict=True) if y == -100]
    assert prompt_ids([messages[:1]], tokenizer) == [before]
    assert predict(zoo.build("llama").eval(), tokenizer, [messages[:1]], settings=Decoding(max_new_tokens=3))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"input 0.*no chat template"):
        prompt_ids([messages[:1]], tokenizer)


def test_a_long_input_loses_its_start():
    tokenizer = zoo.tokenizer()
    (whole,) = prompt_ids([INPUTS[1]], tokenizer)
    opening = len(whole) - len(tokenizer(INPUTS[1], add_special_tokens=False)["input_ids"])
    assert prompt_ids([INPUTS[1]], tokenizer, max_length=3) == [[*whole[:opening], *whole[-3:]]]


def test_the_papers_settings():
    assert Decoding.paper().options() == {
        "max_new_tokens": 64, "num_beams": 5, "do_sample": False, "no_repeat_ngram_size": 0, "length_penalty": 1.0,
        "early_stopping": False,
    }  # fmt: skip
    summary = Decoding.paper("summary", max_new_tokens=80)
    assert (summary.beams, summary.length_penalty, summary.max_new_tokens) == (6, 0.8, 80)
    with pytest.raises(ConfigError, match="'table' and 'summary'"):
        Decoding.paper("story")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"beams": 0}, "beams=0"),
        ({"sample": True, "beams": 2}, "drawing or beam search"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"stop": ""}, "stop is an empty text"),
    ],
)
def test_settings_that_make_no_sense(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Decoding(**wrong)


def test_nothing_to_go_on_from():
    model, tokenizer = zoo.build("llama").eval(), zoo.tokenizer()
    with pytest.raises(ConfigError, match="batch_size=0"):
        predict(model, tokenizer, INPUTS, batch_size=0)
    with pytest.raises(DataError, match="input 1 is empty, and this tokenizer opens no text by itself"):
        predict(model, tokenizer, ["a film", ""])
