"""Losses with a site left out or alone, against prefixes that were cut by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from looking import baked, batch

import foreword as fw
import zoo
from foreword.evaluate import inside


def cut(prefix, names):
    """The same prefix at some sites only."""
    groups = {g: {n: t for n, t in getattr(prefix, g).items() if n in names}
              for g in ("keys", "values", "bias", "gates", "readings", "memory", "memory_up")}  # fmt: skip
    return replace(prefix, sites=[s for s in prefix.sites if s.name in names], **groups)


def loss_by_hand(model, prefix, batches):
    """Mean over all labels, from the logits."""
    tuning = fw.attach(model, prefix) if prefix is not None else None
    total, count = 0.0, 0
    for one in batches:
        logits = zoo.logits(model, **one)
        labels = one["labels"]
        if not model.config.is_encoder_decoder and "Masked" not in type(model).__name__:
            logits, labels = logits[:, :-1], labels[:, 1:]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != -100).sum())
    if tuning is not None:
        tuning.detach()
    return total / count, count


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("what", ["prefix", "together"])
def test_it_is_the_loss_of_a_prefix_without_the_site(name, what):
    config = {"prefix": fw.PrefixConfig(length=3, init="random", gate="head"),
              "together": [fw.PrefixConfig(length=3, init="random"), fw.MemoryConfig(rank=2)]}[what]  # fmt: skip
    model = zoo.build(name)
    prefix = baked(model, name, config)
    batches = [batch(name), batch(name, (11, 6))] if name != "t5" else [batch(name)]
    found = inside.layer_losses(model, prefix, batches)
    names = [s.name for s in prefix.sites]
    assert list(found.without) == list(found.only) == list(found.kinds) == names
    whole, count = loss_by_hand(model, prefix, batches)
    assert found.whole == pytest.approx(whole, abs=1e-4) and found.labels == count
    assert found.none == pytest.approx(loss_by_hand(model, None, batches)[0], abs=1e-4)
    for n in names[:3]:
        without = loss_by_hand(model, cut(prefix, [m for m in names if m != n]), batches)[0]
        assert found.without[n] == pytest.approx(without, abs=1e-4)
        assert found.only[n] == pytest.approx(loss_by_hand(model, cut(prefix, [n]), batches)[0], abs=1e-4)


def test_a_site_that_no_one_looks_at_changes_nothing():
    model = zoo.build("llama")
    prefix = baked(model, "llama")
    first, second = (s.name for s in prefix.sites)
    for closed in (
        replace(prefix, gates={first: torch.zeros(4)}),
        replace(prefix, bias={first: torch.full((4,), -300.0)}),
    ):
        data = [batch("llama")]
        found = inside.layer_losses(model, closed, data)
        assert found.without[first] == pytest.approx(found.whole, abs=1e-6)
        assert found.only[first] == pytest.approx(found.none, abs=1e-6)
        assert found.only[second] == pytest.approx(found.whole, abs=1e-6) and found.whole != found.none
    share = inside.attention_share(model, closed, data)
    assert share.sites[0].mean == 0 < share.sites[1].mean


def test_what_else_came_with_it_stays():
    model = zoo.build("llama")
    prefix = baked(model, "llama", [fw.PrefixConfig(length=3, init="random"), fw.LoRAConfig(rank=2)])
    data = [batch("llama")]
    found = inside.layer_losses(model, prefix, data)
    lora = inside.methods_of(prefix)["lora"]
    assert found.none == pytest.approx(loss_by_hand(model, lora, data)[0], abs=1e-4)


def test_where_there_is_no_loss():
    model = zoo.build("llama")
    data = batch("llama")
    unlabelled = {k: v for k, v in data.items() if k != "labels"}
    assert "no labels" in inside.layer_losses(model, baked(model, "llama"), [unlabelled]).why
    assert "no attention site" not in inside.layer_losses(model, baked(model, "llama"), [data]).to_json()
    assert "stands" in inside.layer_losses(model, baked(model, "llama", fw.LoRAConfig(rank=2)), [data]).why
    data["labels"] = torch.full_like(data["labels"], -100)
    assert "no example has a label" in inside.layer_losses(model, baked(model, "llama"), [data]).why
    some = batch("llama")  # a batch without labels beside one with
    prefix = baked(model, "llama")
    assert inside.layer_losses(model, prefix, [data, some]) == inside.layer_losses(model, prefix, [some])
