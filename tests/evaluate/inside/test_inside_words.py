"""What virtual tokens say, against explicit matrix products; norms."""

from __future__ import annotations

import pytest
import torch
from looking import OTHERS, alone, baked, batch

import foreword as fw
import zoo
from foreword.evaluate import inside
from foreword.evaluate.inside.words import find_reader, value_logits


def by_hand(name, model, prefix, site):
    """Logits of each virtual token at a site, written out with the names that the architecture has."""
    values = prefix.values[site.name]  # (G, P, E)
    group = site.heads // site.kv_heads
    joined = torch.stack([torch.cat([values[h // group, p] for h in range(site.heads)]) for p in range(3)])
    number = int("".join(c for c in site.name.split(".block.")[-1].split(".layer.")[0] if c.isdigit()) or 0)
    with torch.no_grad():
        if name == "llama":
            x = joined @ model.model.layers[number].self_attn.o_proj.weight.T
            norm = model.model.norm
            x = norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
            return x @ model.lm_head.weight.T
        if name == "gpt2":
            x = joined @ model.transformer.h[number].attn.c_proj.weight  # Conv1D: the other way round
            norm = model.transformer.ln_f
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
            return (norm.weight * x + norm.bias) @ model.lm_head.weight.T
        if name == "bert":
            layer = model.bert.encoder.layer
            x = joined @ layer[int(site.name.split(".")[3])].attention.output.dense.weight.T
            x = layer[-1].output.LayerNorm(x)  # the last state comes out of it
            head = model.cls.predictions
            return head.decoder(head.transform(x))
        assert name == "t5"
        attention = model.get_submodule(site.name)
        x = model.decoder.final_layer_norm(joined @ attention.o.weight.T)
        return x * model.config.d_model**-0.5 @ model.lm_head.weight.T


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_it_is_what_the_matrices_say(name):
    model = zoo.build(name)
    if name == "gpt2":  # biases of the projection belong to the layer, not to a token
        for block in model.transformer.h:
            block.attn.c_proj.bias.data.normal_()
    prefix = baked(model, name)
    reader = find_reader(model, fw.sites(model))
    read = [s for s in prefix.sites if not (name == "t5" and s.kind == "encoder")]
    for site in read:
        want = by_hand(name, model, prefix, site)
        torch.testing.assert_close(value_logits(model, prefix, site, reader), want, atol=1e-4, rtol=1e-4)
    found = inside.lens(model, prefix, zoo.tokenizer(), top=4)
    words = {s.name: s for s in found.sites}
    chances, ids = torch.softmax(by_hand(name, model, prefix, read[0])[:, :99], -1).topk(4)
    said = words[read[0].name].words
    assert [[w for w, _ in row] for row in said] == [[zoo.tokenizer().decode([i]) for i in row] for row in ids.tolist()]
    assert [c for row in said for _, c in row] == pytest.approx(chances.flatten().tolist(), abs=1e-5)
    if name == "t5":
        unread = [s for s in found.sites if s.kind == "encoder"]
        assert len(unread) == 4 and all(not s.words and "decoder" in s.why for s in unread)


@pytest.mark.parametrize("name", [n for n in zoo.ZOO if n not in (*zoo.UNSUPPORTED, "qwen3next", "vit", *OTHERS)])
def test_the_output_projection_is_found(name):
    model = zoo.build(name)
    sites = fw.sites(model)
    reader = find_reader(model, sites)
    assert set(reader.outputs) == {s.name for s in sites} and len(set(reader.outputs.values())) == len(sites)
    assert reader.between, "something normalises the last state of each of these"
    for site, layer in reader.outputs.items():
        assert layer.rsplit(".", 2)[0] in site or site.rsplit(".", 1)[0] in layer


def test_where_it_can_t_be_read_it_says_why():
    gated = zoo.build("qwen3next")  # multiplies what the attention gives before it is projected
    assert "output projection" in inside.lens(gated, baked(gated, "qwen3next"), zoo.tokenizer()).why
    image = zoo.build("vit")
    found = inside.lens(image, baked(image, "vit"), zoo.tokenizer(), example_inputs=zoo.inputs("vit"))
    assert "no vocabulary" in found.why
    model = zoo.build("llama")
    assert "no virtual tokens" in inside.lens(model, baked(model, "llama", fw.MemoryConfig()), zoo.tokenizer()).why
    with pytest.raises(fw.MismatchError):
        inside.lens(zoo.build("llama", seed=3), baked(model, "llama"), zoo.tokenizer())


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_norms_are_those_of_the_keys_and_values(name):
    model = zoo.build(name)
    prefix = baked(model, name)
    data = batch(name)
    found = inside.norms(model, prefix, [data])
    seen = {s.name: [] for s in prefix.sites}
    from foreword.sites import recording

    with recording(model, lambda call, _: seen[call.name].append((call.key[0], call.value[0]))), torch.no_grad():
        for row in alone(name, data):
            model(**row)
    for site, got in zip(prefix.sites, found.sites, strict=True):
        assert got.keys == pytest.approx(prefix.keys[site.name].norm(dim=-1).mean(0).tolist(), abs=1e-5)
        values = [v for _, v in seen[site.name]]
        rest = torch.cat([v[:, 1:] for v in values], 1)
        assert got.text_values == pytest.approx(float(rest.norm(dim=-1).mean()), abs=1e-5)
        assert got.first_value == pytest.approx(
            float(torch.stack([v[:, 0].norm(dim=-1).mean() for v in values]).mean())
        )
    assert "no virtual tokens" in inside.norms(model, baked(model, name, fw.MemoryConfig()), [data]).why
    with pytest.raises(fw.MismatchError, match="other weights"):
        inside.norms(zoo.build(name, seed=3), prefix, [data])
    inside.norms(zoo.build(name, seed=3), prefix, [data], force=True)


def test_what_needs_a_condition_is_refused():
    model = zoo.build("llama")
    what = fw.PrefixConfig(length=2, init="random", reparam="mlp", hidden=8, condition=3)
    conditional = baked(model, "llama", what)
    with pytest.raises(fw.ConfigError, match="given"):
        inside.norms(model, conditional, [batch("llama")])
    with pytest.raises(fw.ConfigError, match="given"):
        inside.lens(model, conditional, zoo.tokenizer())
