"""The prefix's share of attention, against the weights that eager attention returns."""

from __future__ import annotations

import pytest
import torch

import foreword as fw
import zoo
from foreword.shares import attention_shares


def attached(model, name, **options):
    tuning = fw.attach(
        model, fw.PrefixConfig(**{"length": 3, "init": "random", **options}), example_inputs=zoo.inputs(name)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in tuning.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return tuning


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "gptoss", "qwen3", "bert", "t5", "bart"])
@pytest.mark.parametrize("options", [{}, {"gate": "head"}, {"gate": "input"}])
def test_it_is_the_weight_of_the_virtual_tokens(name, options):
    model, arguments = zoo.build(name, attn="eager"), zoo.inputs(name)
    tuning = attached(model, name, **options)
    shares = attention_shares(model, **arguments)
    with torch.no_grad():
        out = model(**arguments, output_attentions=True)
    kinds = {"encoder": out.get("encoder_attentions") or out.get("attentions"), "cross": out.get("cross_attentions"),
             "self": out.get("decoder_attentions") or out.get("attentions")}  # fmt: skip
    layers = dict.fromkeys(kinds, 0)
    for site in tuning.sites:
        weights = kinds[site.kind][layers[site.kind]]
        layers[site.kind] += 1
        torch.testing.assert_close(shares[site.name], weights[..., :3].sum(-1), atol=1e-5, rtol=1e-4)
    again = zoo.build(name)
    attached(again, name, **options)
    if name != "gemma2":  # sdpa knows no softcap
        for site, share in attention_shares(again, **arguments).items():
            torch.testing.assert_close(share, shares[site], atol=1e-4, rtol=1e-3)


def test_padding_infix_and_growth():
    model, ids = zoo.build("llama"), zoo.ids(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    tuning = attached(model, "llama", visible="infix")
    with fw.boundary(4):
        shares = attention_shares(model, input_ids=ids, attention_mask=mask)
    for share in shares.values():
        assert not share[:, :, :4].any() and (share[:, :, 4:] > 0).all()
    tuning.detach()
    tuning = attached(model, "llama")
    whole = attention_shares(model, input_ids=ids)
    tuning.grow_to(3, (1, 0.0))
    fewer = attention_shares(model, input_ids=ids)
    first = tuning.sites[0].name
    assert (fewer[first] < whole[first]).all()
    prefix = tuning.bake().slice(0, 2)
    tuning.detach()
    fw.attach(model, prefix)
    for site, share in attention_shares(model, input_ids=ids).items():
        torch.testing.assert_close(share, fewer[site], atol=1e-5, rtol=1e-4)


def test_strength_moves_it_and_gates_have_none():
    model, ids = zoo.build("llama"), zoo.ids()
    tuning = attached(model, "llama")
    first = tuning.sites[0].name
    one = attention_shares(model, input_ids=ids)[first]
    tuning.strength = 2.0
    two = attention_shares(model, input_ids=ids)[first]
    torch.testing.assert_close(two / (1 - two), 2 * one / (1 - one), atol=1e-4, rtol=1e-3)  # odds are multiplied
    tuning.detach()
    attached(model, "llama", gate="zero")
    assert all(s.isnan().all() for s in attention_shares(model, input_ids=ids).values())


def test_a_mixed_batch():
    model, ids = zoo.build("llama"), zoo.ids(3)
    tuning = attached(model, "llama")
    prefix = tuning.bake()
    alone = attention_shares(model, input_ids=ids)
    tuning.detach()
    library = fw.Library(model)
    library.add("a", prefix)
    with library.use(["a", None, "a"]):
        mixed = attention_shares(model, input_ids=ids)
    first = tuning.sites[0].name  # further up the rows' states differ
    torch.testing.assert_close(mixed[first][0], alone[first][0], atol=1e-5, rtol=1e-4)
    assert not mixed[first][1].any()
    library.detach()
    with pytest.raises(fw.AttachError, match="attach one first"):
        attention_shares(model, input_ids=ids)
