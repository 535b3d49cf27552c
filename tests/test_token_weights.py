"""Weights on single virtual tokens: n counts like n copies of the token, 0 like no token at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface

import foreword as fw
from foreword.attention import SitePrefix, attend, attention_path
from test_attention import eager

SDPA = AttentionInterface._global_mapping["sdpa"]


def drawn(seed, batch, text, length):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = normal(batch, 4, text, 8), normal(batch, 2, text, 8), normal(batch, 2, text, 8)
    return q, k, v, normal(1, 2, length, 8), normal(1, 2, length, 8)


@given(
    copies=st.lists(st.integers(0, 3), min_size=1, max_size=6), batch=st.integers(1, 3), text=st.integers(1, 6),
    path=st.sampled_from(["merged", "concat", "step"]), delegate=st.sampled_from(["sdpa", "eager"]),
    padded=st.booleans(), gate=st.sampled_from([None, "zero", "head"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_token_of_weight_n_counts_like_n_copies(copies, batch, text, path, delegate, padded, gate, seed):
    if gate is None and not sum(copies):
        copies = [1, *copies]
    q, k, v, pk, pv = drawn(seed, batch, text, len(copies))
    more = {"gate": torch.tensor([0.5, 1, 2, -1])} if gate == "zero" else {}
    more |= {"bias": torch.tensor([0.1, -1, 2, 0])} if gate == "head" else {}
    weights = torch.tensor(copies, dtype=torch.float32).log()[None]
    index = [i for i, n in enumerate(copies) for _ in range(n)]
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    mask = None
    if padded or delegate == "eager":
        mask = torch.ones(text, text, dtype=torch.bool).tril()[None, None].repeat(batch, 1, 1, 1)
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)

    def out(prefix):
        with attention_path(path):
            return attend(prefix, eager if delegate == "eager" else SDPA, delegate, module, q, k, v, mask, scaling=0.4)[
                0
            ]

    got = out(SitePrefix(pk, pv, visible=weights, **more))
    want = out(SitePrefix(pk[:, :, index], pv[:, :, index], **more))
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-6)  # the weights are float32
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    used = (q, k, v, pk, pv)
    for a, b in zip(
        torch.autograd.grad(got, used, probe, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(want, used, probe, allow_unused=True, materialize_grads=True), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_flash_and_flex_say_that_they_cannot():
    q, k, v, pk, pv = drawn(0, 1, 3, 2)
    prefix = SitePrefix(pk, pv, visible=torch.zeros(1, 2))
    with pytest.raises(fw.AttachError, match="weigh them"):
        attend(prefix, SDPA, "flash_attention_2", SimpleNamespace(is_causal=True), q, k, v, None, scaling=0.4)
