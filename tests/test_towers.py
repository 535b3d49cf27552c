"""Vision-language models (LLaVA's kind): prefixes in the text tower, in the vision tower, or in both."""

from __future__ import annotations

import pytest
import torch

import foreword as fw
import zoo

WHERE = {"text": None, "vision": r".*vision.*", "both": ".*"}


def attached(model, arguments, where, **options):
    config = fw.PrefixConfig(**{"length": 3, "init": "random", "sites": WHERE[where], **options})
    tuning = fw.attach(model, config, example_inputs=arguments)
    towers = {s.tower for s in tuning.sites}
    assert towers == {"text": {""}, "vision": {"vision_config"}, "both": {"", "vision_config"}}[where]
    return tuning


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_every_site_learns_and_nothing_else(where, checkpointing):
    model, arguments = zoo.build("llava").train(), zoo.inputs("llava")
    base = zoo.logits(model, **arguments)
    tuning = attached(model, arguments, where)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    labels = arguments["input_ids"].masked_fill(arguments["input_ids"] == 100, -100)
    model(**arguments, labels=labels).loss.backward()
    # The last vision layer's output is not always read (LLaVA takes the layer before it).
    unread = [p for p in tuning.encoder.parameters() if p.grad is None or not p.grad.any()]
    assert len(unread) <= (2 if where != "text" else 0)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("foreword."))
    tuning.detach()
    assert torch.equal(zoo.logits(model, **arguments), base)


@pytest.mark.parametrize("where", WHERE)
def test_pictures_are_described_the_same_from_a_file(where, tmp_path):
    """Generation with a cache, without one, and with the loaded prefix."""
    model, arguments = zoo.build("llava"), zoo.inputs("llava")
    tuning = attached(model, arguments, where)
    options = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(**arguments, **options)
    assert torch.equal(model.generate(**arguments, **options, use_cache=False), want)
    logits = zoo.logits(model, **arguments)
    tuning.bake().save(tmp_path / "p")
    tuning.detach()
    assert not torch.equal(zoo.logits(model, **arguments), logits)
    loaded = fw.Prefix.load(tmp_path / "p")
    again = fw.attach(model, loaded, example_inputs=arguments)
    assert torch.equal(zoo.logits(model, **arguments), logits)
    assert torch.equal(model.generate(**arguments, **options), want)
    again.detach()


def test_the_vision_tower_is_that_model_with_the_same_prefix():
    """A prefix in LLaVA's tower does what it does to the tower standing alone."""
    model, arguments = zoo.build("llava"), zoo.inputs("llava")
    tuning = attached(model, arguments, "vision")
    prefix = tuning.bake()
    within = model.model.vision_tower(arguments["pixel_values"]).last_hidden_state
    tuning.detach()
    tower = model.model.vision_tower
    pictures = {"pixel_values": arguments["pixel_values"]}
    start = next(iter(prefix.keys)).split("vision_tower.")[0] + "vision_tower."
    states = {n.removeprefix(start): (prefix.keys[n], prefix.values[n]) for n in prefix.keys}
    fw.attach(tower, fw.Prefix.from_tensors(tower, states, example_inputs=pictures), example_inputs=pictures)
    torch.testing.assert_close(tower(**pictures).last_hidden_state, within)


def test_a_text_starts_the_text_tower_only(tokenizer):
    model, arguments = zoo.build("llava"), zoo.inputs("llava")
    text = zoo.SENTENCES[0]
    both = fw.PrefixConfig(length=4, init=text, sites=".*")
    tuning = fw.attach(model, both, tokenizer=tokenizer, example_inputs=arguments)
    prefix = tuning.bake()
    tuning.detach()
    plain = fw.attach(model, fw.PrefixConfig(length=4, init=text), tokenizer=tokenizer, example_inputs=arguments)
    for name, keys in plain.bake().keys.items():
        torch.testing.assert_close(prefix.keys[name], keys)
    assert all(k.std() > 0 for k in prefix.keys.values()) and len(prefix.keys) > len(plain.sites)
    plain.detach()
    with pytest.raises(fw.ConfigError, match=r"a text doesn't reach .*vision.*random"):
        fw.attach(
            model, fw.PrefixConfig(length=4, init=text, sites=".*vision.*"), tokenizer=tokenizer,
            example_inputs=arguments,
        )  # fmt: skip


@pytest.mark.parametrize("where", ["vision", "both"])
def test_pictures_with_different_conditions(where):
    model, arguments = zoo.build("llava"), zoo.inputs("llava")
    tuning = attached(model, arguments, where, reparam="mlp", hidden=8, condition=5)
    vectors = torch.randn(2, 5)
    together = zoo.logits(model, **arguments, condition=vectors)
    prefix = tuning.bake()
    tuning.detach()
    for row, vector in enumerate(vectors):
        own = fw.attach(model, prefix.given(vector), example_inputs=arguments)
        torch.testing.assert_close(zoo.logits(model, **arguments)[row], together[row], atol=2e-5, rtol=1e-4)
        own.detach()
