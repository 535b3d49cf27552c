"""Generation with a prefix: every way of it gives the tokens that full forward passes give."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import foreword as fw
import zoo

NEW = 6
CACHED = [n for n in zoo.DECODERS if n != "qwen3next"]


def prefixed(name, length=3):
    model = zoo.build(name)
    tensors = zoo.random_prefix(model, fw.sites(model), length, scale=2.0)
    fw.attach(model, fw.Prefix.from_tensors(model, tensors))
    return model


def generate(model, ids, **how):
    how = {"do_sample": False, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, **how}
    return model.generate(input_ids=ids, **how)


def by_hand(model, ids, decoder=None):
    """The best token of a whole forward pass, NEW times."""
    grown = ids if decoder is None else decoder
    for _ in range(NEW):
        arguments = {"input_ids": grown} if decoder is None else {"input_ids": ids, "decoder_input_ids": grown}
        grown = torch.cat([grown, zoo.logits(model, **arguments)[:, -1:].argmax(-1)], 1)
    return grown


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_greedy_in_every_way(name):
    model, ids = prefixed(name), zoo.ids(2, 5)
    want = by_hand(model, ids)
    assert not torch.equal(want, by_hand(zoo.build(name), ids))
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        if how.get("cache_implementation") and name == "qwen3next":
            continue  # transformers has no static cache for it
        assert torch.equal(generate(model, ids, **how), want), how
    trainable = zoo.build(name)
    tuning = fw.attach(trainable, fw.PrefixConfig(length=3, init="random"))
    want = generate(trainable, ids)
    prefix = tuning.bake()
    tuning.detach()
    fw.attach(trainable, prefix)
    assert torch.equal(generate(trainable, ids), want)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder(name):
    model, ids = prefixed(name), zoo.ids(2, 5)
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    want = by_hand(model, ids, start)
    assert not torch.equal(want, by_hand(zoo.build(name), ids, start))
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"max_new_tokens": NEW, "num_beams": 1}):
        assert torch.equal(generate(model, ids, **how), want), how


@pytest.mark.parametrize("trainable", [False, True])
def test_the_encoder_alone_reads_its_prefix(trainable):
    """Generation runs the encoder as a model of its own."""
    model, ids = zoo.build("t5"), zoo.ids(2, 5)
    base = model.get_encoder()(ids)[0]
    tensors = zoo.random_prefix(model, [s for s in fw.sites(model) if s.kind == "encoder"])
    fw.attach(model, fw.Prefix.from_tensors(model, tensors), trainable=trainable)
    start = torch.zeros(2, 1, dtype=torch.long)
    whole = model(input_ids=ids, decoder_input_ids=start).encoder_last_hidden_state
    alone = model.get_encoder()(ids)[0]
    assert torch.equal(whole, alone) and not torch.allclose(alone, base, atol=1e-2)
    assert torch.equal(generate(model, ids), by_hand(model, ids, start))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
def test_beams_and_samples(name):
    model, ids = prefixed(name), zoo.ids(2, 5)
    beams = generate(model, ids, num_beams=3, num_return_sequences=3)
    assert beams.shape == (6, 5 + NEW)
    for cached in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, ids, num_beams=3, num_return_sequences=3, **cached), beams)

    def sample(**how):
        torch.manual_seed(5)
        return generate(model, ids, do_sample=True, num_return_sequences=2, **how)

    assert torch.equal(sample(), sample()) and torch.equal(sample(), sample(use_cache=False))


def test_assisted_generation_is_greedy():
    model, ids = prefixed("llama"), zoo.ids(1, 5)
    want = generate(model, ids, max_new_tokens=12)
    for assistant in (zoo.build("llama"), zoo.build("llama", seed=1), prefixed("llama")):
        assert torch.equal(generate(model, ids, max_new_tokens=12, assistant_model=assistant), want)
    assert torch.equal(generate(model, ids, max_new_tokens=12, prompt_lookup_num_tokens=2), want)


@pytest.mark.parametrize("name", CACHED)
def test_padded_rows_are_single_rows(name):
    model = prefixed(name)
    rows = [zoo.ids(1, n, seed=n) for n in (6, 3, 1)]
    single = [generate(model, row)[0, row.shape[1] :] for row in rows]
    padded = torch.zeros(3, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 6 - row.shape[1] :] = row
    mask = (torch.arange(6) >= 6 - torch.tensor([[6], [3], [1]])).long()
    for how in ({}, {"cache_implementation": "static"}):
        got = generate(model, padded, attention_mask=mask, **how)[:, 6:]
        assert torch.equal(got, torch.stack(single))


@pytest.mark.parametrize("name", [*CACHED, "bert", "modernbert"])
def test_right_padding_changes_no_logits(name):
    model, ids = prefixed(name), zoo.ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    got = zoo.logits(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got[1:, :4], zoo.logits(model, input_ids=ids[1:, :4]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[:1], zoo.logits(model, input_ids=ids[:1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma3"])
def test_with_an_offset(name):
    """Text that starts at P, cached, uncached, static, padded: PEFT's convention."""
    model, ids = zoo.build(name), zoo.ids(2, 5)
    tensors = zoo.random_prefix(model, fw.sites(model))
    fw.attach(model, fw.Prefix.from_tensors(model, tensors, position_offset=3))
    want = by_hand(model, ids)
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, ids, **how), want), how
    padded, mask = torch.cat([torch.zeros(2, 2, dtype=torch.long), ids], 1), torch.ones(2, 7, dtype=torch.long)
    mask[:, :2] = 0
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, padded, attention_mask=mask, **how)[:, 2:], want), how


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_embeddings_and_positions_by_hand(name):
    model, ids = prefixed(name), zoo.ids(2, 5)
    want = zoo.logits(model, input_ids=ids)
    embeddings = model.get_input_embeddings()(ids).detach()
    assert torch.equal(zoo.logits(model, inputs_embeds=embeddings), want)
    assert torch.equal(zoo.logits(model, input_ids=ids, position_ids=torch.arange(5)[None]), want)
    got = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, generate(model, ids)[:, 5:])


def test_a_pipeline():
    model, tokenizer = prefixed("llama"), zoo.tokenizer()
    pipe = tf.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    (said,) = pipe(zoo.SENTENCES[0], max_new_tokens=4, do_sample=False)
    ids = tokenizer(zoo.SENTENCES[0], return_tensors="pt")["input_ids"]
    assert said["generated_text"].startswith(zoo.SENTENCES[0])
    new = generate(model, ids, max_new_tokens=4)[0, ids.shape[1] :]
    assert said["generated_text"] == zoo.SENTENCES[0] + tokenizer.decode(new)


def test_chunked_prefill_and_a_cache_carried_on():
    model, ids = prefixed("llama"), zoo.ids(2, 9)
    want, cache = zoo.logits(model, input_ids=ids), tf.DynamicCache()
    parts = [zoo.logits(model, input_ids=part, past_key_values=cache) for part in ids.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_without_a_token_to_pad_with_is_refused():
    tokenizer = zoo.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    library = fw.Library(zoo.build("llama"))
    with pytest.raises(fw.ConfigError, match=r"neither a padding nor an end token; set tokenizer.pad_token"):
        library.generate(tokenizer, ["The film", "There is a place"], [None, None], max_new_tokens=2)
