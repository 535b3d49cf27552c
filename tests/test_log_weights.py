"""Tokens that stand for several: a weight added to their scores, against as many copies of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import foreword as fw
import zoo
from test_packing import make

COPIES = (3, 1, 2)


def weighed(prefix):
    """Each token once, with the weight of so many."""
    weights = torch.tensor([math.log(n) for n in COPIES])
    return replace(prefix, log_weights={n: weights.clone() for n in prefix.keys})


def repeated(prefix):
    """Each token so often."""
    index = torch.repeat_interleave(torch.arange(len(COPIES)), torch.tensor(COPIES))
    return replace(
        prefix,
        keys={n: k[:, index] for n, k in prefix.keys.items()},
        values={n: v[:, index] for n, v in prefix.values.items()},
    )


def said(model, prefix, trainable=False, **arguments):
    tuning = fw.attach(model, prefix, trainable=trainable)
    try:
        return zoo.logits(model, **arguments)
    finally:
        tuning.detach()


@pytest.mark.parametrize("path", ["auto", "concat", "merged", "step"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "gptoss"])
def test_a_weight_is_as_good_as_copies(name, path):
    model, prefix = zoo.build(name), make(len(COPIES), name=name)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    for arguments in ({"input_ids": zoo.ids()}, {"input_ids": zoo.ids(), "attention_mask": mask}):
        with fw.attention_path(path):
            one, several = (said(model, p, **arguments) for p in (weighed(prefix), repeated(prefix)))
        torch.testing.assert_close(one, several, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(one, said(model, prefix, **arguments), atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart", "bert"])
def test_also_in_encoders_and_across(name):
    model = zoo.build(name)
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model)))
    one, several = (said(model, p, **zoo.inputs(name)) for p in (weighed(prefix), repeated(prefix)))
    torch.testing.assert_close(one, several, atol=1e-5, rtol=1e-4)


def test_in_generation_and_with_gates():
    model, prefix = zoo.build("llama"), make(len(COPIES))
    gates = {n: torch.full((4,), 0.5) for n in prefix.keys}
    for own in (prefix, replace(prefix, bias=gates), replace(prefix, gates=gates)):
        texts = []
        for p in (weighed(own), repeated(own)):
            tuning = fw.attach(model, p)
            texts.append(model.generate(zoo.ids(), max_new_tokens=6, do_sample=False))
            tuning.detach()
        assert torch.equal(*texts)
        torch.testing.assert_close(*(said(model, p, input_ids=zoo.ids()) for p in (weighed(own), repeated(own))))


def test_in_a_library_also_mixed():
    model, prefix, other = zoo.build("llama"), make(len(COPIES)), make(5, seed=1)
    ids, library = zoo.ids(3), fw.Library(model)
    for name, own in (("one", weighed(prefix)), ("several", repeated(prefix)), ("other", other)):
        library.add(name, own)
    with library.use("one"):
        torch.testing.assert_close(zoo.logits(model, input_ids=ids)[0], said_by(model, library, "several", ids)[0])
    with library.use(["one", "other", None]):
        mixed = zoo.logits(model, input_ids=ids)
    for row, name in enumerate(("several", "other", None)):
        torch.testing.assert_close(mixed[row], said_by(model, library, name, ids)[row], atol=1e-5, rtol=1e-4)
    library.detach()


def said_by(model, library, name, ids):
    with library.use(name):
        return zoo.logits(model, input_ids=ids)


def test_the_share_of_a_token_counts_its_weight():
    model, prefix = zoo.build("llama"), make(len(COPIES))
    shares = []
    for p in (weighed(prefix), repeated(prefix)):
        tuning = fw.attach(model, p)
        shares.append(fw.attention_shares(model, input_ids=zoo.ids()))
        tuning.detach()
    for name in shares[0]:
        torch.testing.assert_close(shares[0][name], shares[1][name], atol=1e-5, rtol=1e-4)


def test_they_are_kept_baked_saved_cut_and_joined(tmp_path):
    model, prefix = zoo.build("llama"), weighed(make(len(COPIES)))
    name = next(iter(prefix.keys))
    for trainable in (False, True):
        tuning = fw.attach(model, prefix, trainable=trainable)
        assert not any("token_weights" in n for n, _ in tuning.named_parameters())
        assert tuning.bake() == prefix
        tuning.detach()
    assert fw.Prefix.load(prefix.save(tmp_path / "p")) == prefix
    assert '"format": 2' in (tmp_path / "p" / "foreword.json").read_text()  # versions before would leave them out
    assert prefix.slice(1).log_weights[name].tolist() == prefix.log_weights[name][1:].tolist()
    joined = prefix.join(make(2))
    assert joined.log_weights[name].tolist() == [*prefix.log_weights[name].tolist(), 0, 0]
    assert prefix.to(torch.bfloat16).log_weights[name].dtype == torch.bfloat16
    assert prefix != replace(prefix, log_weights={})
    with pytest.raises(fw.MismatchError, match=r"log_weight has shape \(2,\), expected \(3,\)"):
        replace(prefix, log_weights={name: torch.zeros(2)})


def test_training_goes_on_with_them():
    """The gradient of a weighed token is that of all its copies together."""
    model, prefix, found = zoo.build("llama"), make(len(COPIES)), []
    for p in (weighed(prefix), repeated(prefix)):
        tuning = fw.attach(model, p, trainable=True)
        model(input_ids=zoo.ids(), labels=zoo.ids()).loss.backward()
        found.append({n: q.grad for n, q in tuning.named_parameters()})
        tuning.detach()
    index = torch.repeat_interleave(torch.arange(len(COPIES)), torch.tensor(COPIES))
    for name, several in found[1].items():
        summed = torch.zeros_like(found[0][name]).index_add_(1, index, several)
        torch.testing.assert_close(found[0][name], summed, atol=1e-6, rtol=1e-4)
