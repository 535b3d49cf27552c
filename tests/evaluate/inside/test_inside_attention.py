"""Shares by head, position and token, the first token's part, and dilution: against transformers' own weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from looking import alone, baked, batch, eager_weights

import foreword as fw
import zoo
from foreword.evaluate import inside


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "bert", "t5", "bart"])
@pytest.mark.parametrize("gate", [None, "head", "input"])
def test_shares_are_the_weights_of_eager_attention(name, gate):
    model = zoo.build(name, attn="eager")
    prefix = baked(model, name, fw.PrefixConfig(length=3, init="random", gate=gate))
    data = batch(name)
    found = inside.attention_share(model, prefix, [data])
    rows = alone(name, data)
    base = [eager_weights(model, prefix.sites, **row) for row in rows]
    fw.attach(model, prefix)
    with_it = [eager_weights(model, prefix.sites, **row) for row in rows]
    assert found.texts == 3 and found.queries == 50
    for site, got in zip(prefix.sites, found.sites, strict=True):
        weights = [w[site.name].double() for w in with_it]  # (1, H, S, 3 + N) each
        tokens = torch.cat([w[0, :, :, :3] for w in weights], 1)  # (H, all S, 3)
        assert got.name == site.name and got.kind == site.kind
        torch.testing.assert_close(torch.tensor(got.heads).double(), tokens.sum(-1).mean(1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(got.tokens).double(), tokens.mean((0, 1)), atol=1e-5, rtol=1e-4)
        at_4 = torch.stack([w[0, :, 4, :3].sum(-1).mean() for w in weights]).mean()
        assert got.positions[4] == pytest.approx(float(at_4), abs=1e-5)
        start = 1 if site.causal else 0
        first = torch.cat([w[0, :, start:, 3] for w in weights], 1)  # beside the prefix: (1 - alpha) p
        alpha = torch.cat([w[0, :, start:, :3].sum(-1) for w in weights], 1)
        assert got.first == pytest.approx(float(first.mean()), abs=1e-5)
        text = torch.cat([w[0, :, start:, 3:].sum(-1) for w in weights], 1)
        assert got.from_first == pytest.approx(float((alpha * first / text).sum() / alpha.sum()), abs=1e-4)
        bare = torch.cat([b[site.name][0, :, start:, 0] for b in base], 1)
        assert got.first_base == pytest.approx(float(bare.mean()), abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_dilution_is_the_shares_of_eager_weights_on_cut_and_grown_texts(name):
    model = zoo.build(name, attn="eager")
    prefix = baked(model, name)
    data = batch(name)
    lengths = [4, 16] if name == "t5" else [4, 16, 32]
    found = inside.dilution(model, prefix, [data], lengths=lengths, strengths=())
    assert (
        found.lengths == lengths and found.uniform[0] == pytest.approx(3 / 7) and list(found.variants) == ["as trained"]
    )
    texts = [r["input_ids"][0] for r in alone(name, data)]
    outputs = [r["labels"][0] for r in alone(name, data)]
    start = torch.zeros(3, 1, dtype=torch.long)  # what a T5 decoder reads first
    fw.attach(model, prefix)
    for i, length in enumerate(lengths):

        def joined(parts, length=length):
            return torch.stack([torch.cat([*parts[s:], *parts[:s]])[:length] for s in range(3)])

        given = {"input_ids": joined(texts)}
        if name == "t5":
            given["decoder_input_ids"] = torch.cat([start, joined(outputs)[:, :-1]], 1)
        weights = eager_weights(model, prefix.sites, **given)
        for site in prefix.sites:
            share = weights[site.name][..., :3].sum(-1)
            want = share[..., -1].mean() if site.kind == "self" else share.mean()
            assert found.variants["as trained"][site.name][i] == pytest.approx(float(want), abs=1e-5)


def test_a_cut_text_has_the_share_of_that_position_in_the_whole():
    """A causal model doesn't see what comes later: two of the diagnostics must agree."""
    model = zoo.build("llama")
    prefix = baked(model, "llama")
    data = batch("llama", (24,))
    shares = inside.attention_share(model, prefix, [data])
    found = inside.dilution(model, prefix, [data], lengths=[3, 11, 24])
    for site in shares.sites:
        want = [site.positions[n - 1] for n in (3, 11, 24)]
        assert found.variants["as trained"][site.name] == pytest.approx(want, abs=1e-5)
    first = prefix.sites[0].name  # further up, the queries differ as well
    one, two, half = (found.variants[v][first] for v in ("as trained", "strength 2", "strength 0.5"))
    model = zoo.build("llama")
    tuning = fw.attach(model, prefix, strength=2.0)
    with torch.no_grad():
        seen = fw.attention_shares(model, input_ids=data["input_ids"])
    assert two == pytest.approx([float(seen[first][..., n - 1].mean()) for n in (3, 11, 24)], abs=1e-5)
    assert all(h < o < t for h, o, t in zip(half, one, two, strict=True))
    tuning.detach()


def test_a_module_that_all_layers_share_has_the_mean_of_its_calls():
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4}
    config = tf.AlbertConfig(**sizes, num_hidden_layers=3, intermediate_size=37, attn_implementation="eager")
    model = tf.AlbertForMaskedLM(config).eval()
    prefix = baked(model, "bert")
    (site,) = prefix.sites
    assert site.calls == 3
    data = batch("bert")
    rows = alone("bert", data)
    found = inside.attention_share(model, prefix, [data])
    curve = inside.dilution(model, prefix, [data], lengths=[8], strengths=())
    with torch.no_grad():
        base = [model(**row, output_attentions=True).attentions for row in rows]
        fw.attach(model, prefix)
        layers = [model(**row, output_attentions=True).attentions for row in rows]
        cut = {"input_ids": torch.stack([r["input_ids"][0, :8] for r in rows])}
        eight = model(**cut, output_attentions=True).attentions
    shares = torch.cat([torch.stack(w)[..., :3].sum(-1).flatten(0, 1) for w in layers], 2)  # (3 calls, H, all S)
    assert found.queries == 50
    assert found.sites[0].heads == pytest.approx(shares.mean((0, 2)).tolist(), abs=1e-5)
    first = torch.cat([torch.stack(w)[..., 0].flatten(0, 1) for w in base], 2)
    assert found.sites[0].first_base == pytest.approx(float(first.mean()), abs=1e-5)
    want = torch.stack(eight)[..., :3].sum(-1).mean()
    assert curve.variants["as trained"][site.name] == [pytest.approx(float(want), abs=1e-5)]


def test_gates_are_taken_off():
    model = zoo.build("llama")
    plain = baked(model, "llama")
    names = [s.name for s in plain.sites]
    data = [batch("llama")]
    want = inside.attention_share(model, plain, data)
    assert want.without_gates is None and not want.weights
    weighed = replace(plain, bias={n: torch.full((4,), -1.0) for n in names})
    found = inside.attention_share(model, weighed, data)
    assert found.without_gates == want.sites
    assert all(g.mean < w.mean for g, w in zip(found.sites, want.sites, strict=True))
    assert found.weights[names[0]]["heads"] == pytest.approx([0.3679] * 4, abs=1e-4)
    gated = replace(plain, gates={names[0]: torch.tensor([0.5, 0.0, -0.25, 1.0])})
    found = inside.attention_share(model, gated, data)
    assert found.without_gates == want.sites and found.weights[names[0]]["kind"] == "zero"
    first, second = found.sites
    assert first.heads == [None] * 4 and first.mean is first.from_first is first.first is None and second.mean > 0
    assert sum(first.tokens) == pytest.approx((0.5 + 0.25 + 1.0) / 4, abs=1e-5)  # the weights that values come in with
    curve = inside.dilution(model, gated, data, lengths=[8], strengths=())
    assert curve.variants["as trained"][names[0]] == [None] and list(curve.variants)[1] == "without its gates"
    assert curve.mean("as trained") == curve.variants["as trained"][names[1]]


def test_tokens_that_stand_for_several():
    """A merged token of weight 2 has the share of two."""
    model = zoo.build("llama")
    prefix = baked(model, "llama")
    twice = replace(prefix, keys={n: k[:, [0, 1, 2, 2]] for n, k in prefix.keys.items()},
                    values={n: v[:, [0, 1, 2, 2]] for n, v in prefix.values.items()})  # fmt: skip
    merged = replace(prefix, log_weights={n: torch.tensor([1.0, 1.0, 2.0]).log() for n in prefix.keys})
    apart, one = (inside.attention_share(model, p, [batch("llama")]) for p in (twice, merged))
    for a, b in zip(apart.sites, one.sites, strict=True):
        assert a.heads == pytest.approx(b.heads, abs=1e-5)
        assert a.tokens[2] + a.tokens[3] == pytest.approx(b.tokens[2], abs=1e-5)


def test_an_infix_is_seen_by_the_output_only():
    model = zoo.build("llama")
    prefix = baked(model, "llama", fw.PrefixConfig(length=3, init="random", visible="infix"))
    data = batch("llama", (12,))
    data["labels"][:, :8] = -100
    found = inside.attention_share(model, prefix, [data])
    for site in found.sites:
        assert not any(site.positions[:8]) and all(p > 0 for p in site.positions[8:])
    curve = inside.dilution(model, prefix, [data], lengths=[4, 8], strengths=())
    assert all(x > 0 for row in curve.variants["as trained"].values() for x in row)


def test_what_has_no_share_says_so():
    model = zoo.build("llama")
    memory = baked(model, "llama", fw.MemoryConfig())
    data = [batch("llama")]
    for found in (inside.attention_share(model, memory, data), inside.dilution(model, memory, data)):
        assert isinstance(found, inside.Unavailable) and "memory" in found.why
        assert found.to_json() == {"unavailable": found.why}
    lora = baked(model, "llama", fw.LoRAConfig(rank=2))
    assert "no virtual tokens" in inside.attention_share(model, lora, data).why
    image = zoo.build("vit")
    assert "only texts" in inside.dilution(image, baked(image, "vit"), [batch("vit")]).why


def test_refusals():
    model = zoo.build("llama")
    prefix = baked(model, "llama")
    with pytest.raises(fw.DataError, match="no text"):
        inside.attention_share(model, prefix, [])
    with pytest.raises(fw.DataError, match="5 tokens in all"):
        inside.dilution(model, prefix, [batch("llama", (5,))])
    with pytest.raises(fw.DataError, match="5 tokens in all, so none of 8"):
        inside.dilution(model, prefix, [batch("llama", (5,))], lengths=[8])
    with pytest.raises(fw.ConfigError, match="126"):
        inside.dilution(model, prefix, [batch("llama")], lengths=[8, 200])
    with pytest.raises(fw.MismatchError, match="other weights"):
        inside.attention_share(zoo.build("llama", seed=1), prefix, [batch("llama")])
    assert not any("foreword" in n for n, _ in model.named_modules())
    conditional = baked(model, "llama", fw.PrefixConfig(length=2, init="random", reparam="mlp", hidden=8, condition=3))
    with pytest.raises(fw.ConfigError, match="given"):
        inside.attention_share(model, conditional, [batch("llama")])
