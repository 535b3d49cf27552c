"""Spectra of the change, against two whole passes and plain linear algebra."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from looking import alone, baked, batch

import foreword as fw
import zoo
from foreword.evaluate import inside
from foreword.evaluate.inside._taps import tapped

METHODS = {
    "prefix": lambda: fw.PrefixConfig(length=3, init="random"),
    "gated": lambda: fw.PrefixConfig(length=3, init="random", gate="zero"),
    "memory": lambda: fw.MemoryConfig(),
    "lora": lambda: fw.LoRAConfig(rank=2),
    "bitfit": lambda: fw.BitFitConfig(missing="add"),
    "full": lambda: fw.FullConfig(),
    "together": lambda: [fw.PrefixConfig(length=3, init="random"), fw.MemoryConfig(rank=2), fw.LoRAConfig(rank=2)],
}


def outputs(model, site, rows):
    """What an attention site gives over all texts: ``(N, H * E)``."""
    found = []
    with tapped(model, [site]) as taps, torch.no_grad():
        for row in rows:
            model(**row)
            found.append(taps[site].out.flatten(2).flatten(0, 1).double())
    return torch.cat(found).numpy()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_at_the_first_site_it_is_the_difference_of_two_passes(name, method):
    """Below the first site nothing has changed, so that the input of its layer is the base model's."""
    what = METHODS[method]()
    if method == "full" or (method == "bitfit" and name != "llama"):  # not the embeddings and norms, which lie below
        last = r"\.bias" if method == "bitfit" else ""
        what = fw.FullConfig(parameters=rf".*(layers|h|layer)\.\d+\.(self_attn|attn|attention\.self).*{last}")
    model = zoo.build(name)
    prefix = baked(model, name, what, noise=0.05 if method in ("bitfit", "full") else 0.3)
    data = batch(name)
    site = fw.sites(model)[0].name
    rows = alone(name, data)
    before = outputs(model, site, rows)
    tuning = fw.attach(model, prefix)
    change = outputs(model, site, rows) - before
    tuning.detach()
    found = inside.spectrum(model, prefix, [data])
    assert found.tokens == len(change) == 50 and found.width == 32
    got = found.sites[0]
    assert got.name == site
    centred = change - change.mean(0)
    values = np.linalg.eigvalsh(np.cov(change.T, bias=True))[::-1]
    kept = values / values.sum()
    np.testing.assert_allclose(got.values[:8], kept[:8], atol=1e-4)
    energy = (change**2).sum(1).mean()
    assert got.size == pytest.approx((energy / (before**2).sum(1).mean()) ** 0.5, rel=1e-3)
    assert got.constant == pytest.approx((change.mean(0) ** 2).sum() / energy, abs=1e-4)
    squares = (np.cov(change.T, bias=True) ** 2).sum()
    assert got.participation == pytest.approx((centred**2).sum() ** 2 / squares / 50**2, rel=1e-3)
    positive = kept[kept > 1e-12]
    assert got.effective_rank == pytest.approx(np.exp(-(positive * np.log(positive)).sum()), rel=1e-2)
    assert outputs(model, site, rows) == pytest.approx(before), "the model is as it was"
    assert all(p.requires_grad for p in model.parameters())


def test_a_memory_of_rank_one_has_one_singular_value():
    model = zoo.build("llama")
    prefix = baked(model, "llama", fw.MemoryConfig(rank=1))
    one_head = {n: torch.where(torch.arange(4)[:, None, None] == 2, m, 0.0) for n, m in prefix.memory.items()}
    found = inside.spectrum(model, replace(prefix, memory=one_head), [batch("llama")])
    for site in found.sites:
        assert (
            site.values == [1.0] and site.effective_rank == pytest.approx(1) and site.participation == pytest.approx(1)
        )
        assert 0 <= site.constant < 1 and site.size > 0
    every_head = inside.spectrum(model, prefix, [batch("llama")])
    assert all(len(s.values) == 4 for s in every_head.sites)  # one a head


def test_one_virtual_token_that_takes_all_is_the_text_s_change_away_from_it():
    """With one token, a head moves towards one value: o_with - o = alpha (v - o)."""
    model = zoo.build("llama")
    prefix = baked(model, "llama", fw.PrefixConfig(length=1, init="random"))
    heavy = replace(prefix, bias={s.name: torch.full((4,), 60.0) for s in prefix.sites})  # alpha = 1
    data = batch("llama")
    rows = alone("llama", data)
    site = prefix.sites[0].name
    before = outputs(model, site, rows)
    found = inside.spectrum(model, heavy, [data]).sites[0]
    target = prefix.values[site].repeat_interleave(2, 0)[:, 0].flatten().double().numpy()
    values = np.linalg.eigvalsh(np.cov((target - before).T, bias=True))[::-1]
    np.testing.assert_allclose(found.values[:10], (values / values.sum())[:10], atol=1e-5)


def test_parts_are_told_apart():
    model = zoo.build("llama")
    whole = baked(model, "llama", METHODS["together"]())
    parts = inside.methods_of(whole)
    assert list(parts) == ["virtual tokens", "memory", "lora"]
    data = [batch("llama")]
    alone_ = {name: inside.spectrum(model, part, data) for name, part in parts.items()}
    assert parts["virtual tokens"].longest == 3 and not parts["memory"].longest and not parts["lora"].memory
    assert all(s.size > 0 for found in alone_.values() for s in found.sites)
    assert list(inside.methods_of(baked(model, "llama"))) == ["virtual tokens"]


def test_layers_beyond_the_prefix_are_seen():
    """Virtual tokens at the second layer alone, LoRA in both."""
    model = zoo.build("llama")
    both = [fw.PrefixConfig(length=3, init="random", sites=[1]), fw.LoRAConfig(rank=2)]
    prefix = baked(model, "llama", both)
    names = [s.name for s in fw.sites(model)]
    data = [batch("llama")]
    found = inside.spectrum(model, prefix, data)
    lora = inside.spectrum(model, inside.methods_of(prefix)["lora"], data)
    assert [s.name for s in found.sites] == [s.name for s in lora.sites] == names
    assert found.sites[0] == lora.sites[0] and found.sites[1] != lora.sites[1]
    tokens = inside.spectrum(model, inside.methods_of(prefix)["virtual tokens"], data)
    assert [s.name for s in tokens.sites] == names[1:]


def test_what_changes_no_attention_says_so():
    model = zoo.build("llama")
    adapters = baked(model, "llama", fw.AdapterConfig(width=4))
    assert "nothing in it changes" in inside.spectrum(model, adapters, [batch("llama")]).why
    closed = replace(baked(model, "llama"), gates={s.name: torch.zeros(4) for s in fw.sites(model)})
    assert isinstance(inside.spectrum(model, closed, [batch("llama")]), inside.Unavailable)


def test_it_stops_at_enough_tokens():
    model = zoo.build("llama")
    prefix = baked(model, "llama")
    few = inside.spectrum(model, prefix, [batch("llama")], max_tokens=24)
    assert few.tokens == 24 and all(len(s.values) <= 23 for s in few.sites)
    done = []
    inside.spectrum(model, prefix, [batch("llama")], max_tokens=24, progress=lambda i, n: done.append((i, n)))
    assert done[-1] == (3, 3)
