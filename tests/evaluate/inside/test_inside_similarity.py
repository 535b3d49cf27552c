"""How alike two prefixes are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looking import baked

import foreword as fw
import zoo
from foreword.evaluate import inside
from foreword.evaluate.inside.similarity import cka, overlap


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_prefix_is_like_itself(name):
    model = zoo.build(name)
    prefix = baked(model, name)
    found = inside.similarity(prefix, prefix)
    for matrix in (found.keys, found.values):
        assert torch.tensor(matrix).diagonal().tolist() == pytest.approx([1.0] * 3)
        torch.testing.assert_close(torch.tensor(matrix), torch.tensor(matrix).T)
    assert [s.name for s in found.sites] == [s.name for s in prefix.sites]
    for site in found.sites:
        for pair in (site.keys, site.values):
            assert [pair.cosine, pair.cka, pair.overlap] == pytest.approx([1.0] * 3)
        assert site.memory is None


def test_token_by_token_and_site_by_site():
    model = zoo.build("llama")
    prefix = baked(model, "llama")
    back = replace(prefix, keys={n: k.flip(1) for n, k in prefix.keys.items()},
                   values={n: v.flip(1) for n, v in prefix.values.items()})  # fmt: skip
    found = inside.similarity(prefix, back)
    assert [row[2 - i] for i, row in enumerate(found.keys)] == pytest.approx([1.0] * 3)
    assert all(s.keys.overlap == pytest.approx(1) and s.keys.cosine < 0.99 for s in found.sites)
    tokens = [(prefix.keys[n].transpose(0, 1).flatten(1)[0], back.keys[n].transpose(0, 1).flatten(1)[1])
              for n in prefix.keys]  # fmt: skip
    by_hand = torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in tokens])
    assert found.keys[0][1] == pytest.approx(float(by_hand.mean()), abs=1e-6)


def test_a_shifted_prefix_is_the_same_one():
    model = zoo.build("llama")
    prefix = baked(model, "llama")
    found = inside.similarity(prefix, prefix.shift(7))
    assert torch.tensor(found.keys).diagonal().tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert all(s.keys.cka == pytest.approx(1, abs=1e-6) for s in found.sites)
    learned = zoo.build("gpt2")
    one = baked(learned, "gpt2")
    other = replace(one, position_offset=4)
    assert "can't be undone" in inside.similarity(one, other).why


def test_lengths_and_sites_may_differ():
    model = zoo.build("llama")
    prefix = baked(model, "llama")
    longer = baked(model, "llama", fw.PrefixConfig(length=5, init="random"))
    found = inside.similarity(prefix, longer)
    assert len(found.keys) == 3 and len(found.keys[0]) == 5
    assert all(s.keys.cka is None and 0 <= s.keys.overlap <= 1 for s in found.sites)
    top = baked(model, "llama", fw.PrefixConfig(length=3, init="random", sites=[1]))
    assert [s.name for s in inside.similarity(prefix, top).sites] == [prefix.sites[1].name]


def test_memories_are_compared_as_matrices():
    model = zoo.build("llama")
    whole, low = baked(model, "llama", fw.MemoryConfig()), baked(model, "llama", fw.MemoryConfig(rank=2))
    product = replace(low, memory={n: m @ low.memory_up[n] for n, m in low.memory.items()}, memory_up={})
    assert [s.memory for s in inside.similarity(low, product).sites] == pytest.approx([1.0, 1.0])
    found = inside.similarity(whole, low)
    assert all(abs(s.memory) < 0.5 and s.keys is None for s in found.sites) and found.keys == []
    assert "same site" in inside.similarity(whole, baked(model, "llama")).why


def test_prefixes_of_other_models_are_refused():
    model = zoo.build("llama")
    prefix = baked(model, "llama")
    with pytest.raises(fw.MismatchError, match=r"no site in common.*GPT2"):
        inside.similarity(prefix, baked(zoo.build("gpt2"), "gpt2"))
    with pytest.raises(fw.MismatchError, match="different base models: parameter"):
        inside.similarity(prefix, baked(zoo.build("llama", seed=4), "llama"))
    deep = baked(zoo.build("deepseek"), "deepseek")
    with pytest.raises(fw.MismatchError, match="heads differ"):
        inside.similarity(prefix, deep)


@given(st.integers(2, 6), st.integers(2, 9), st.integers(0, 99))
def test_cka_and_overlap_know_no_rotation_or_scale(tokens, width, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    b = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    assert cka(a, 3 * a @ turn + 1) == pytest.approx(1)
    centred = a - a.mean(0), b - b.mean(0)
    by_paper = (centred[1].T @ centred[0]).norm() ** 2 / (
        (centred[0].T @ centred[0]).norm() * (centred[1].T @ centred[1]).norm()
    )
    assert cka(a, b) == pytest.approx(float(by_paper)) and 0 <= cka(a, b) <= 1 + 1e-9
    mix = torch.randn(tokens, tokens, generator=generator, dtype=torch.float64)
    assert overlap(a, mix @ a) == pytest.approx(1, abs=1e-4)
    assert overlap(a @ turn, b @ turn) == pytest.approx(overlap(a, b)) and 0 <= overlap(a, b) <= 1 + 1e-9
    apart = torch.cat([a, torch.zeros_like(a)], 1), torch.cat([torch.zeros_like(b), b], 1)
    assert overlap(*apart) == pytest.approx(0)
