"""Rotations found in the model and proved on its own keys; positions that can't be moved are refused."""

from __future__ import annotations

import pytest
import torch

import foreword as fw
import zoo
from foreword.positions import Rotation, check_offset, find_rotations, group_rotations
from foreword.sites import dry_run

STARTS = {"deepseek": 8}  # the first dimensions of its keys don't rotate


def keys_at(model, start, length=6):
    positions = torch.arange(start, start + length)[None]
    found = {}
    arguments = {"input_ids": zoo.ids(1, length), "position_ids": positions}
    dry_run(model, lambda call, _: found.setdefault(call.name, call.key[0].clone()), arguments)
    return found


@pytest.mark.parametrize("name", [*zoo.ROTARY, "modernbert"])
def test_rotated_keys_are_the_keys_made_elsewhere(name):
    model = zoo.build(name)
    sites = fw.sites(model)
    rotations = find_rotations(model, sites)
    assert set(rotations) == {s.name for s in sites}
    assert {r.start for r in rotations.values()} == {STARTS.get(name, 0)}
    for start, moved in ((0, 5), (0, 37), (11, 2), (20, -20)):
        before, after = keys_at(model, start), keys_at(model, start + moved)
        for site, rotation in rotations.items():
            torch.testing.assert_close(rotation(before[site], moved), after[site], atol=1e-5, rtol=1e-5)
            assert (before[site] - after[site]).abs().max() > 0.05


@pytest.mark.parametrize("name", zoo.ROTARY)
def test_rotations_are_found_in_half_precision(name):
    model = zoo.build(name)
    exact = find_rotations(model, fw.sites(model))
    half = find_rotations(model.to(torch.bfloat16), fw.sites(model))
    assert {n: (r.layout, r.start) for n, r in half.items()} == {n: (r.layout, r.start) for n, r in exact.items()}
    for name_, rotation in half.items():
        torch.testing.assert_close(rotation.inv_freq, exact[name_].inv_freq, rtol=1e-2, atol=1e-3)


def test_gemma3_rotates_differently_in_its_windows():
    model = zoo.build("gemma3")
    rotations = find_rotations(model, fw.sites(model))
    groups, index = group_rotations(rotations)
    assert len(groups) == 2 and list(index.values()) == [0, 1, 0]


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "t5", "bart"])
def test_learned_positions_have_no_rotation(name):
    model = zoo.build(name)
    sites = fw.sites(model)
    assert find_rotations(model, sites) == {}
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, sites))
    with pytest.raises(fw.MismatchError, match=r"can't be rotated.*position_offset"):
        prefix.shift(3)


def test_rotation_turns_back_and_adds_up():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    for layout in ("half", "interleaved"):
        rotation = Rotation(torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64), layout, 4)
        torch.testing.assert_close(rotation(rotation(keys, 7), -7), keys)
        torch.testing.assert_close(rotation(rotation(keys, 7), 4), rotation(keys, 11))
        assert torch.equal(rotation(keys, 7)[..., :4], keys[..., :4])
        assert torch.equal(rotation(keys, 7)[..., 10:], keys[..., 10:])
        torch.testing.assert_close(rotation(keys, 7).norm(dim=-1), keys.norm(dim=-1))
    still = Rotation(torch.empty(0))
    assert torch.equal(still(keys, 9), keys)


@pytest.mark.parametrize(("name", "message"), [("roberta", "its own way"), ("t5", "takes position"), ("bart", "takes")])
def test_an_offset_that_would_mean_something_else_is_refused(name, message):
    model = zoo.build(name)
    with pytest.raises(fw.MismatchError, match=f"{message}.*position_offset=0"):
        fw.attach(model, fw.PrefixConfig(length=2, init="random", position_offset=2))
    check_offset(model, 0)
    tensors = zoo.random_prefix(model, fw.sites(model))
    with pytest.raises(fw.MismatchError, match=message):
        fw.attach(model, fw.Prefix.from_tensors(model, tensors, position_offset=2))
    fw.attach(model, fw.Prefix.from_tensors(model, tensors)).detach()


@pytest.mark.parametrize("name", [*zoo.DECODERS, "bert"])
def test_an_offset_is_accepted(name):
    check_offset(zoo.build(name), 5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_text_starts_at_the_offset(name):
    """Padding counts as in generation; positions given by hand are moved; arguments by position work."""
    model, ids = zoo.build(name), zoo.ids(2, 6)
    tensors = zoo.random_prefix(model, fw.sites(model))
    tuning = fw.attach(model, fw.Prefix.from_tensors(model, tensors))
    at5 = zoo.logits(model, input_ids=ids, position_ids=torch.arange(5, 11)[None])
    tuning.detach()
    fw.attach(model, fw.Prefix.from_tensors(model, tensors, position_offset=5))
    torch.testing.assert_close(zoo.logits(model, input_ids=ids), at5)
    torch.testing.assert_close(zoo.logits(model, input_ids=ids, position_ids=torch.arange(6)[None]), at5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, at5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    got = zoo.logits(model, input_ids=padded, attention_mask=mask)[:, 3:]
    torch.testing.assert_close(got, at5, atol=1e-4, rtol=1e-4)
