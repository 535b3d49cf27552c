"""Fewer tokens: what pruning and merging keep, against the model itself and against sums by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.compression import merge, prune, token_shares
from foreword.compression.merging import _Tokens
from foreword.data import Collator, EncodedDataset, EncodeStats


def make(name="llama", length=4, seed=0):
    model = zoo.build(name)
    return model, fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), length, seed))


def dataset(n=5, seed=0):
    """Examples of different lengths, so that batches are padded."""
    rows = [row[: 4 + i] for i, row in enumerate(zoo.ids(n, n + 4, seed).tolist())]
    return EncodedDataset(rows, [[-100, *row[1:]] for row in rows], EncodeStats(n, 0, 0, 0, 0, 0))


def said(model, prefix, **arguments):
    tuning = fw.attach(model, prefix)
    try:
        return zoo.logits(model, **(arguments or {"input_ids": zoo.ids()}))
    finally:
        tuning.detach()


def even(prefix):
    """All tokens seen alike."""
    return {s.name: torch.full((s.kv_heads, prefix.length(s.name)), 0.1) for s in prefix.sites if prefix.length(s.name)}


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5"])
def test_shares_are_the_weights_of_eager_attention(name):
    """The mean over real positions and the heads of a group, example by example without padding."""
    model = zoo.build(name, attn="eager")
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), 4))
    data, seq2seq = dataset(), model.config.is_encoder_decoder
    shares = token_shares(model, zoo.tokenizer(), prefix, data, batch_size=3)
    sums = {s.name: torch.zeros(s.heads, 4) for s in prefix.sites}
    counts = dict.fromkeys(sums, 0)
    tuning = fw.attach(model, prefix)
    for i in range(len(data)):
        batch = Collator(0, seq2seq=seq2seq)([data[i]])
        with torch.no_grad():
            out = model(**batch, output_attentions=True)
        kinds = {"encoder": out.get("encoder_attentions"), "cross": out.get("cross_attentions"),
                 "self": out.get("decoder_attentions") or out.get("attentions")}  # fmt: skip
        layers = dict.fromkeys(kinds, 0)
        for site in prefix.sites:
            weights = kinds[site.kind][layers[site.kind]][0, :, :, :4]
            layers[site.kind] += 1
            if seq2seq and site.kind != "encoder":
                weights = weights[:, batch["labels"][0] != -100]
            sums[site.name] += weights.sum(1)
            counts[site.name] += weights.shape[1]
    tuning.detach()
    for site in prefix.sites:
        expected = (sums[site.name] / counts[site.name]).view(site.kv_heads, -1, 4).mean(1)
        torch.testing.assert_close(shares[site.name], expected, atol=1e-5, rtol=1e-4)


def test_shares_of_an_infix_and_behind_a_gate():
    model, _ = make()
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", visible="infix"))
    infix = tuning.bake()
    tuning.detach()
    none = EncodedDataset([[5, 6, 7]], [[-100, -100, -100]], EncodeStats(1, 0, 0, 0, 0, 0))
    assert all(not s.any() for s in token_shares(model, zoo.tokenizer(), infix, none).values())
    seen = token_shares(model, zoo.tokenizer(), infix, dataset())
    assert all(0 < float(s.sum(1).max()) < 1 for s in seen.values())
    _, prefix = make()
    gated = replace(prefix, gates={n: torch.full((4,), -0.25) for n in prefix.keys})
    for share in token_shares(model, zoo.tokenizer(), gated, dataset()).values():
        torch.testing.assert_close(share.sum(1), torch.full((2,), 0.25), atol=1e-5, rtol=1e-5)


def test_measuring_leaves_the_model_as_it_was():
    model, prefix = make()
    model.train()
    modes = [m.training for m in model.modules()]
    token_shares(model, zoo.tokenizer(), prefix, dataset())
    assert [m.training for m in model.modules()] == modes and not hasattr(model, "foreword")
    with pytest.raises(fw.DataError, match="no example"):
        token_shares(model, zoo.tokenizer(), prefix, EncodedDataset([], [], EncodeStats(0, 0, 0, 0, 0, 0)))
    other = zoo.build("llama", seed=1)
    with pytest.raises(fw.MismatchError, match="other weights"):
        token_shares(other, zoo.tokenizer(), prefix, dataset())
    assert not hasattr(other, "foreword")


# ---------------------------------------------------------------- pruning


def unseen(prefix, model):
    """The prefix with a second token that no query of the first site sees: its share is 0."""
    first = prefix.sites[0].name
    keys = dict(prefix.keys)
    keys[first] = keys[first].clone()
    keys[first][:, 1] = 0
    keys[first][:, 1, 0] = -1000.0
    with torch.no_grad():  # all queries get the same large part along that key
        attention = model.get_submodule(first)
        attention.c_attn.bias[: 4 * 8].view(4, 8)[:, 0] = 60.0
    return replace(prefix, keys=keys), first


@pytest.mark.parametrize("uniform", [False, True])
def test_a_token_that_nobody_sees_leaves_without_a_trace(uniform):
    model, prefix = make("gpt2")
    prefix, first = unseen(prefix, model)
    prefix = fw.Prefix.from_tensors(model, {first: (prefix.keys[first], prefix.values[first])})
    shares = token_shares(model, zoo.tokenizer(), prefix, dataset())
    assert not shares[first][:, 1].any() and shares[first].any()
    small = prune(prefix, shares, 3, uniform=uniform)
    assert torch.equal(small.keys[first], prefix.keys[first][:, [0, 2, 3]])
    torch.testing.assert_close(said(model, small), said(model, prefix), atol=1e-6, rtol=1e-6)


@given(st.data())
def test_what_stays_is_what_is_seen_most(data):
    """Against choosing by hand: of each head the largest shares, of all sites the largest means."""
    _, prefix = make(length=5)
    shares = {
        n: torch.rand(2, 5, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
        for n in prefix.keys
    }
    tokens, uniform = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    small = prune(prefix, shares, tokens, uniform=uniform)
    assert sum(small.length(n) for n in small.keys) == tokens * len(small.keys)
    falling = {n: s.sort(descending=True).values.mean(0).tolist() for n, s in shares.items()}
    best = sorted((x for own in falling.values() for x in own), reverse=True)[: tokens * len(falling)]
    for name, share in shares.items():
        length = tokens if uniform else sum(x >= best[-1] for x in falling[name])
        assert small.length(name) == length
        for head in range(2):
            kept = sorted(sorted(range(5), key=lambda i: -share[head][i])[:length])
            assert torch.equal(small.keys[name][head], prefix.keys[name][head][kept])
            assert torch.equal(small.values[name][head], prefix.values[name][head][kept])


def test_weighed_tokens_go_from_all_heads_together():
    _, prefix = make(length=3)
    name, other = prefix.keys
    weighed = replace(prefix, log_weights={name: torch.tensor([0.1, 0.2, 0.3])})
    shares = {n: torch.tensor([[0.5, 0.1, 0.2], [0.0, 0.3, 0.9]]) for n in prefix.keys}
    small = prune(weighed, shares, 1, uniform=True)
    assert torch.equal(small.keys[name], prefix.keys[name][:, [2]]) and small.log_weights[name].tolist() == [
        pytest.approx(0.3)
    ]
    assert torch.equal(small.keys[other], torch.stack([prefix.keys[other][0, [0]], prefix.keys[other][1, [2]]]))


def test_a_site_may_lose_all_and_the_rest_still_works(tmp_path):
    model, prefix = make()
    first, second = prefix.keys
    shares = {first: torch.full((2, 4), 0.01), second: torch.full((2, 4), 0.2)}
    small = prune(prefix, shares, 2)
    assert (small.length(first), small.length(second)) == (0, 4)
    only = fw.Prefix.from_tensors(model, {second: (prefix.keys[second], prefix.values[second])})
    torch.testing.assert_close(said(model, small), said(model, only))
    for storage in ("plain", "int4"):
        back = fw.Prefix.load(small.save(tmp_path / storage, storage=storage))
        assert (back.length(first), back.length(second)) == (0, 4)
    library = fw.Library(model)
    library.add("small", small)
    with library.use("small"):
        torch.testing.assert_close(zoo.logits(model, input_ids=zoo.ids()), said_alone(model, library, only))
    library.detach()


def said_alone(model, library, prefix):
    library.add("only", prefix)
    with library.use("only"):
        return zoo.logits(model, input_ids=zoo.ids())


# ---------------------------------------------------------------- merging


def doubled(prefix, times=2):
    """The second token stands there so often."""
    index = [0, *[1] * times, 2, 3]
    return replace(
        prefix,
        keys={n: k[:, index] for n, k in prefix.keys.items()},
        values={n: v[:, index] for n, v in prefix.values.items()},
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("times", [2, 4])
def test_merging_equal_tokens_is_exact(name, times):
    """They become the one token, which counts for so many, and the model says the same."""
    model, single = make(name)
    several = doubled(single, times)
    shares = token_shares(model, zoo.tokenizer(), several, dataset())
    one = merge(several, shares, 4)
    for site in one.keys:
        torch.testing.assert_close(one.keys[site], single.keys[site], atol=1e-6, rtol=1e-6)
        expected = torch.tensor([0, math.log(times), 0, 0])
        torch.testing.assert_close(one.log_weights[site], expected, atol=1e-5, rtol=1e-5)
    arguments = zoo.inputs(name)
    torch.testing.assert_close(said(model, one, **arguments), said(model, several, **arguments), atol=1e-5, rtol=1e-5)
    unweighed = merge(several, shares, 4, weigh=False)
    assert not unweighed.log_weights
    torch.testing.assert_close(
        said(model, unweighed, **arguments), said(model, single, **arguments), atol=1e-5, rtol=1e-5
    )


def test_merging_equal_weighed_tokens_is_exact():
    model, prefix = make()
    several = doubled(prefix)
    weights = {n: torch.tensor([0.0, math.log(3), math.log(5), 0, 0]) for n in several.keys}
    several = replace(several, log_weights=weights)
    one = merge(several, token_shares(model, zoo.tokenizer(), several, dataset()), 4)
    assert all(w[1] == pytest.approx(math.log(8), abs=1e-4) for w in one.log_weights.values())
    torch.testing.assert_close(said(model, one), said(model, several), atol=1e-5, rtol=1e-5)


@given(st.integers(2, 6), st.integers(0, 2**31))
def test_a_merged_token_never_gets_more_than_both(count, seed):
    """The weight is a lower bound: log sum exp of the scores, where the shares are of these scores."""
    generator = torch.Generator().manual_seed(seed)
    keys, query = torch.randn(1, count, 8, generator=generator).double(), torch.randn(8, generator=generator).double()
    scores = keys[0] @ query
    site = _Tokens(keys, keys, scores.softmax(0)[None], None)
    while site.count > 1:
        site.merge_nearest(weigh=True)
    own = site.kept(site.keys)[0, 0] @ query + site.weights[site.alive]
    torch.testing.assert_close(own, scores.logsumexp(0)[None], atol=1e-6, rtol=1e-6)  # equality at these shares
    other = torch.randn(8, generator=generator).double()
    elsewhere = site.kept(site.keys)[0, 0] @ other + site.weights[site.alive]
    assert float(elsewhere) <= float((keys[0] @ other).logsumexp(0)) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_methods_leave_the_prefix_alone(dtype):
    _, prefix = make()
    prefix = prefix.to(dtype)
    copy = prefix._map(torch.clone)
    shares = even(prefix)
    for small in (
        merge(prefix, shares, 2),
        prune(prefix, shares, 2, uniform=True),
        merge(merge(prefix, shares, 3), even_of(2, 3), 2),
    ):
        assert small.longest == 2 and all(k.dtype == dtype for k in small.keys.values())
    assert prefix == copy


def even_of(heads, length):
    return {f"model.layers.{i}.self_attn": torch.full((heads, length), 0.1) for i in (0, 1)}


def test_pairs_are_merged_from_the_cheapest_on():
    """Against every pair's cost by hand."""
    _, prefix = make(length=6)
    shares = {n: torch.rand(2, 6) + 0.01 for n in prefix.keys}
    name = next(iter(prefix.keys))
    keys, share = prefix.keys[name].double(), shares[name].double()

    def cost(i, j):
        apart = 1 - torch.cosine_similarity(keys[:, i], keys[:, j], dim=-1)
        return float((share[:, i] * share[:, j] / (share[:, i] + share[:, j]) * apart).mean())

    i, j = min(((i, j) for i in range(6) for j in range(i + 1, 6)), key=lambda pair: cost(*pair))
    small = merge(prefix, shares, 5)
    parts = share[:, [i, j]] / share[:, [i, j]].sum(1, keepdim=True)
    expected = keys.clone()
    expected[:, i] = parts[:, :1] * keys[:, i] + parts[:, 1:] * keys[:, j]
    left = [n for n in range(6) if n != j]
    torch.testing.assert_close(small.keys[name].double(), expected[:, left], atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("method", [prune, merge])
def test_refusals(method):
    _, prefix = make()
    shares = even(prefix)
    name = next(iter(shares))
    for tokens, said in (
        (0, "1 or more"),
        (-1, "1 or more"),
        (1.5, "1 or more"),
        (True, "1 or more"),
        (4, "has 4 at most"),
    ):
        with pytest.raises(fw.ConfigError, match=said):
            method(prefix, shares, tokens)
    for change, said in (
        ({name: shares[name][:1]}, r"are \(1, 4\), expected \(2 heads, 4 tokens\)"),
        ({name: shares[name][:, :3]}, r"are \(2, 3\)"),
        ({"elsewhere": shares[name]}, "at elsewhere, where the prefix has no token"),
    ):
        with pytest.raises(fw.MismatchError, match=said):
            method(prefix, {**shares, **change}, 2)
    with pytest.raises(fw.MismatchError, match="are missing"):
        method(prefix, {}, 2)
