"""Prefixes that are made of a condition vector a row, against the plain prefix of each row alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreword as fw
import zoo

SIZE = 6
CONFIG = {"length": 3, "init": "random", "reparam": "mlp", "hidden": 8, "condition": SIZE}


def vectors(rows=2, seed=0):
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed))


def stirred(tuning, scale=0.3):
    """Parameters that make a difference: the MLP's last layer starts at zero with a text."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return tuning


def alone(model, prefix, arguments):
    tuning = fw.attach(model, prefix)
    try:
        return zoo.logits(model, **arguments)
    finally:
        tuning.detach()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize(
    "options", [{}, {"freeze_first": True}, {"gate": "head"}, {"gate": "input"}, {"share": "layers"}]
)
def test_each_row_reads_the_prefix_of_its_own_vector(name, options):
    model, arguments = zoo.build(name), zoo.inputs(name, batch=3)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**CONFIG, **options), example_inputs=arguments))
    together = zoo.logits(model, **arguments, condition=vectors(3))
    with tuning.given(condition=vectors(3)):
        assert torch.equal(zoo.logits(model, **arguments), together)
    prefix = tuning.bake()
    tuning.detach()
    base = zoo.logits(model, **arguments)
    for row, vector in enumerate(vectors(3)):
        own = alone(model, prefix.given(vector), arguments)[row]
        assert (own - base[row]).abs().max() > 1e-3
        torch.testing.assert_close(together[row], own, atol=2e-5, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 4), length=st.integers(1, 5), tokens=st.integers(1, 9), depth=st.integers(2, 3),
    path=st.sampled_from(["merged", "concat", "step"]),
)  # fmt: skip
def test_paths_agree_over_shapes(rows, length, tokens, depth, path):
    model, ids = zoo.build("llama"), zoo.ids(rows, tokens)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**{**CONFIG, "length": length}, depth=depth)))
    with fw.attention_path(path):
        together = zoo.logits(model, input_ids=ids, condition=vectors(rows))
    for row, vector in enumerate(vectors(rows)):
        with fw.attention_path("concat"):
            one = zoo.logits(model, input_ids=ids[row : row + 1], condition=vector)
        torch.testing.assert_close(together[row : row + 1], one, atol=2e-5, rtol=1e-4)
    tuning.detach()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("path", ["merged", "concat"])
def test_gradients_are_the_sum_of_the_rows(checkpointing, path):
    """Of the encoder, and of what made the vectors: a picture's encoder can be trained through them."""
    model, ids = zoo.build("llama").train(), zoo.ids(3, 6)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**CONFIG)))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    condition = vectors(3).requires_grad_()
    with fw.attention_path(path):
        with tuning.given(condition=condition):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # after the block: what checkpointing runs again has its prefix still
    ours = [p.grad.clone() for p in tuning.parameters()]
    for parameter in tuning.parameters():
        parameter.grad = None
    separate = vectors(3).requires_grad_()
    for row in range(3):
        one = ids[row : row + 1]
        (model(input_ids=one, labels=one, condition=separate[row : row + 1]).loss / 3).backward()
    torch.testing.assert_close(condition.grad, separate.grad, atol=1e-6, rtol=1e-4)
    assert condition.grad.abs().min() > 0
    for mine, parameter in zip(ours, tuning.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-6, rtol=1e-4)


def test_training_starts_at_the_text(tokenizer):
    model, ids = zoo.build("llama"), zoo.ids()
    text = zoo.SENTENCES[0]
    want = alone(model, fw.Prefix.from_text(model, tokenizer, text), {"input_ids": ids})
    config = fw.PrefixConfig(**{**CONFIG, "length": None, "init": text})
    tuning = fw.attach(model, config, tokenizer=tokenizer)
    got = zoo.logits(model, input_ids=ids, condition=vectors())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    tuning.detach()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_each_row_alone(name, beams):
    model, arguments = zoo.build(name), {"input_ids": zoo.ids(2, 5)}
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "num_return_sequences": beams}
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**CONFIG)))
    with tuning.given(condition=vectors()):
        together = model.generate(**arguments, **options)
    prefix = tuning.bake()
    tuning.detach()
    different = []
    for row, vector in enumerate(vectors()):
        own = fw.attach(model, prefix.given(vector))
        out = model.generate(input_ids=arguments["input_ids"][row : row + 1], **options)
        assert torch.equal(together[row * beams : (row + 1) * beams], out)
        different.append(out)
        own.detach()


def test_a_new_vector_counts_between_passes_without_gradients():
    """What a pass made is kept for the next one, but not beyond its vector."""
    model, ids = zoo.build("llama"), zoo.ids(1)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**CONFIG)))
    vector = vectors(1)
    with tuning.given(condition=vector):
        first = zoo.logits(model, input_ids=ids)
        vector.neg_()
        assert (zoo.logits(model, input_ids=ids) - first).abs().max() > 1e-3
    with tuning.given(condition=-vector):
        torch.testing.assert_close(zoo.logits(model, input_ids=ids), first)
        inner = zoo.logits(model, input_ids=ids, condition=vector)  # the call knows better
        assert (inner - first).abs().max() > 1e-3
        torch.testing.assert_close(zoo.logits(model, input_ids=ids), first)
    with torch.inference_mode(), tuning.given(condition=-vector + 0):
        torch.testing.assert_close(model(input_ids=ids).logits, first)
    with pytest.raises(fw.AttachError, match=r"tuning\.given"):
        model(input_ids=ids)


def test_what_one_call_was_told_is_not_the_next_ones():
    model, ids = zoo.build("t5"), zoo.ids(1)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**CONFIG)))
    options = {"max_new_tokens": 4, "do_sample": False}
    with tuning.given(condition=vectors(1)):
        want = model.generate(input_ids=ids, **options)
    model(input_ids=ids, labels=ids, condition=-3 * vectors(1)).loss.backward()
    with tuning.given(condition=vectors(1)):  # generation calls the encoder alone first
        assert torch.equal(model.generate(input_ids=ids, **options), want)
    seen = [zoo.logits(model, input_ids=ids, decoder_input_ids=ids, condition=k * vectors(1)) for k in (1, 2, 3)]
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("options", [{}, {"freeze_first": True, "share": "layers"}, {"depth": 3, "per_kind": True}])
def test_saved_and_loaded_to_the_bit(options, tmp_path):
    model, arguments = zoo.build("t5"), zoo.inputs("t5")
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**CONFIG, **options)))
    want = zoo.logits(model, **arguments, condition=vectors())
    one = tuning.bake(condition=vectors()[1])
    prefix = tuning.bake()
    prefix.save(tmp_path / "p")
    tuning.detach()
    loaded = fw.Prefix.load(tmp_path / "p")
    assert loaded == prefix and loaded.given(vectors()[1]) == one and not one.parts
    frozen = fw.attach(model, loaded)
    torch.testing.assert_close(zoo.logits(model, **arguments, condition=vectors()), want, atol=1e-6, rtol=1e-5)
    assert not list(frozen.parameters())
    frozen.detach()
    again = fw.attach(model, loaded, trainable=True)
    assert {round(g["lr"], 4) for g in again.parameter_groups()} == {1e-3}
    model(**arguments, labels=arguments["decoder_input_ids"], condition=vectors()).loss.backward()
    assert all(p.grad is not None for p in again.parameters())
    assert again.bake() == prefix
    again.detach()


def test_its_parameters_are_counted():
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.PrefixConfig(**CONFIG))
    site = tuning.sites[0]
    out = len(tuning.sites) * site.kv_heads * (site.key_dim + site.value_dim)
    assert tuning.num_parameters == SIZE * 8 + 3 * 8 + (8 * 8 + 8) + (8 * out + out)
    assert "3 virtual tokens" in repr(tuning)


def test_made_prefixes_mix_in_one_batch():
    model, ids = zoo.build("llama"), zoo.ids(3)
    tuning = stirred(fw.attach(model, fw.PrefixConfig(**CONFIG)))
    prefix = tuning.bake()
    tuning.detach()
    want = [alone(model, prefix.given(v), {"input_ids": ids}) for v in vectors()]
    base = zoo.logits(model, input_ids=ids)
    library = fw.Library(model)
    with pytest.raises(fw.ConfigError, match=r"prefix\.given"):
        library.add("whole", prefix)
    for name, vector in zip("ab", vectors(), strict=True):
        library.add(name, prefix.given(vector))
    with library.use(["b", None, "a"]):
        mixed = zoo.logits(model, input_ids=ids)
    for row, expected in enumerate((want[1], base, want[0])):
        torch.testing.assert_close(mixed[row], expected[row], atol=2e-5, rtol=1e-4)
    library.detach()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reparam": "direct"}, 'use reparam="mlp"'),
        ({"depth": 1}, "all tokens would move alike"),
        ({"condition": 0}, "how many numbers"),
        ({"tasks": ("a", "b")}, "can't be used together"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(fw.ConfigError, match=message):
        fw.PrefixConfig(**{**CONFIG, **options})


def test_bad_vectors():
    model, ids = zoo.build("llama"), zoo.ids(2)
    tuning = fw.attach(model, fw.PrefixConfig(**CONFIG))
    for condition, message in (
        (torch.zeros(2, SIZE + 1), r"expected floats \(rows, 6\)"),
        (torch.zeros(2, SIZE, dtype=torch.long), "expected floats"),
        (torch.full((2, SIZE), torch.nan), "not finite"),
    ):
        with pytest.raises(fw.ConfigError, match=message):
            model(input_ids=ids, condition=condition)
    with pytest.raises(fw.AttachError, match="the batch has 2 rows but 3 prefixes"):
        model(input_ids=ids, condition=vectors(3))
    with pytest.raises(fw.ConfigError, match="given a condition and nothing else"), tuning.given(task="a"):
        pass
    assert zoo.logits(model, input_ids=ids, condition=vectors()).isfinite().all()  # a pass that failed is over
    prefix = tuning.bake()
    for change in (lambda: prefix.slice(0, 1), lambda: prefix.shift(2), lambda: prefix.join(prefix)):
        with pytest.raises(fw.ConfigError, match="make a plain one"):
            change()
    tuning.detach()
    plain = fw.attach(model, fw.PrefixConfig(length=2, init="random"))
    with pytest.raises(fw.ConfigError, match="the same for all rows"), plain.given(condition=vectors()):
        pass
    with pytest.raises(fw.ConfigError, match="the same for all rows"):
        plain.bake().given(vectors()[0])


def test_a_damaged_encoder_is_refused():
    from dataclasses import replace

    model = zoo.build("llama")
    tuning = fw.attach(model, fw.PrefixConfig(**CONFIG))
    prefix = tuning.bake()
    tuning.detach()
    record = dict(prefix.parts[0])
    for changed in ({"hidden": 9}, {"groups": [[0]]}, {"depth": 7}, {"condition": "x"}, {"share_layers": True}):
        with pytest.raises(fw.MismatchError, match="damaged"):
            fw.attach(model, replace(prefix, parts=[{**record, **changed}]))
    assert zoo.logits(model, input_ids=zoo.ids()).isfinite().all()
