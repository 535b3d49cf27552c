"""What a prefix becomes in vLLM's cache, the heads of each worker, salts, and the prefixes that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.serve.shelf import Shelf
from foreword.serve.vllm.rows import Shape, check_fits, check_servable, heads_of, layer_number, rows_of
from foreword.serve.vllm.salt import Salt
from foreword.serve.vllm.store import Store
from foreword.visibility import Visibility


def made(name="llama", length=3, seed=0, **more):
    model = zoo.build(name)
    return model, fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), length, seed), **more)


def test_rows_in_a_cache_are_the_prefix():
    """The oracle: transformers' own cache, filled with the rows, and text that starts after them."""
    from transformers import DynamicCache

    model, prefix = made(length=5)
    rows, ids = rows_of(prefix), zoo.ids(1, 7)
    cache = DynamicCache()
    for layer in sorted(rows.keys):
        cache.update(rows.keys[layer].transpose(0, 1)[None], rows.values[layer].transpose(0, 1)[None], layer)
    with torch.no_grad():
        theirs = model(input_ids=ids, past_key_values=cache, attention_mask=torch.ones(1, 12)).logits
    tuning = fw.attach(model, prefix)
    ours = zoo.logits(model, input_ids=ids)
    tuning.detach()
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 64), st.integers(1, 64))
def test_every_head_is_on_some_worker_and_all_hold_as_many(total, ranks):
    if max(total, ranks) % min(total, ranks):
        with pytest.raises(fw.MismatchError):
            heads_of(total, 0, ranks)
        return
    held = [list(range(total))[heads_of(total, rank, ranks)] for rank in range(ranks)]
    assert {len(h) for h in held} == {max(total // ranks, 1)}
    each = [held.count(h) for h in held]
    assert set(each) == {max(ranks // total, 1)} and sorted({n for h in held for n in h}) == list(range(total))
    assert held == sorted(held)


def test_workers_together_hold_the_prefix():
    _, prefix = made(length=4)
    whole = rows_of(prefix)
    parts = [whole.part([0, 1], heads_of(2, rank, 2), torch.float32) for rank in range(2)]
    for layer in (0, 1):
        assert torch.equal(torch.cat([p.keys[layer] for p in parts], 1), whole.keys[layer])
    stage = whole.part([1], slice(0, 2), torch.bfloat16)
    assert list(stage.keys) == [1] and stage.keys[1].dtype == torch.bfloat16 and 2 * stage.nbytes * 2 == whole.nbytes
    with pytest.raises(fw.MismatchError, match="nothing for layer 2"):
        whole.part([1, 2], slice(0, 2), torch.float32)


def test_learned_positions_need_their_offset():
    _, fit = made("gpt2", 3, position_offset=3)
    assert rows_of(fit).length == 3
    for offset in (0, 2, 4):
        with pytest.raises(fw.MismatchError, match="position_offset=3"):
            rows_of(made("gpt2", 3, position_offset=offset)[1])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda p: {"bias": {p.sites[0].name: torch.zeros(4)}}, "gates"),
        (lambda p: {"gates": {p.sites[0].name: torch.zeros(4)}}, "gates"),
        (lambda p: {"readings": {p.sites[0].name: torch.zeros(4, 9)}}, "gates"),
        (lambda p: {"memory": {p.sites[0].name: torch.zeros(4, 8, 8)}}, "memory"),
        (lambda p: {"log_weights": {p.sites[0].name: torch.zeros(3)}}, "merged tokens"),
        (lambda p: {"parts": [{"method": "lora"}]}, r"trained weights \(lora\)"),
        (lambda p: {"visible": Visibility("infix")}, "visible='infix'"),
        (lambda p: {"keys": {n: k[:, :2] for n, k in p.keys.items()},
                    "values": {n: v[:, :2] for n, v in p.values.items()},
                    "sites": [replace(s, kind="encoder") for s in p.sites]}, "encoder"),
        (lambda p: {"sites": [replace(s, sliding_window=16) for s in p.sites]}, "sliding window of 16"),
        (lambda p: {"sites": [replace(s, calls=2) for s in p.sites]}, "called 2 times"),
    ],
)  # fmt: skip
def test_what_a_cache_cannot_hold_is_refused(change, what):
    _, prefix = made()
    assert check_servable(prefix) == 3
    with pytest.raises(fw.MismatchError, match=what):
        check_servable(replace(prefix, **change(prefix)))


def test_lengths_that_differ_and_models_that_differ():
    model = zoo.build("llama")
    sites = fw.sites(model)
    uneven = {s.name: 3 + i for i, s in enumerate(sites)}
    with pytest.raises(fw.MismatchError, match="3, 4 tokens"):
        check_servable(fw.Prefix.from_tensors(model, zoo.random_prefix(model, sites, uneven)))
    some = fw.Prefix.from_tensors(model, zoo.random_prefix(model, sites[1:], 3))
    whole = made()[1]
    check_fits(whole, Shape(2, 2, 8))
    for prefix, shape in (
        (some, Shape(2, 2, 8)),
        (whole, Shape(3, 2, 8)),
        (whole, Shape(2, 4, 8)),
        (whole, Shape(2, 2, 16)),
    ):
        with pytest.raises(fw.MismatchError):
            check_fits(prefix, shape)
    with pytest.raises(fw.MismatchError, match="latent"):
        check_servable(made("deepseek")[1])


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.layers.3.self_attn.attn", 3), ("transformer.h.11.attn", 11), ("a.b", None), ("a.1.b.2", None)],
)
def test_layer_numbers(name, number):
    if number is not None:
        assert layer_number(name) == number
        return
    with pytest.raises(fw.MismatchError):
        layer_number(name)


@given(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", fullmatch=True), st.integers(1, 999_999), st.text(max_size=200)
)
def test_salts_come_back_and_fit_vllm(name, length, client):
    salt = Salt(name, "0f" * 16, length).of_client(client)
    assert Salt.parse(str(salt)) == salt and len(str(salt)) <= 128 and not set(str(salt)) & set("@/\\\0")
    assert bool(salt.client) == bool(client)


@pytest.mark.parametrize(
    "text", ["", "foreword:", "foreword:x:3::t", f"foreword:{'0' * 32}:0::t", f"foreword:{'0' * 32}:3::../t"]
)
def test_other_salts_are_none_of_ours(text):
    with pytest.raises(fw.ConfigError):
        Salt.parse(text)


def test_a_store_keeps_what_it_has_room_for(tmp_path):
    shelf, salts = Shelf(tmp_path), {}
    for seed, name in enumerate("abc"):
        made(seed=seed)[1].save(tmp_path / name)
        salts[name] = Salt(name, shelf.read(name)[1], 3)
    one = rows_of(shelf.load("a")).nbytes
    store = Store(shelf, lambda rows: rows, 2 * one)
    for name in ("a", "b", "a", "c"):
        store.get(salts[name])
    assert len(store) == 2 and store.nbytes == 2 * one
    made(seed=7)[1].save(tmp_path / "a")  # held, so still there; "b" left
    assert torch.equal(store.get(salts["a"]).keys[0], rows_of(made(seed=0)[1]).keys[0])
    made(seed=7)[1].save(tmp_path / "b")
    with pytest.raises(fw.PrefixFileError, match="was replaced"):
        store.get(salts["b"])
    assert len(Store(shelf, lambda rows: rows, one - 1)._held) == 0
    small = Store(shelf, lambda rows: rows, one - 1)
    assert small.get(salts["c"]).length == 3 and len(small) == 0


def test_a_digest_is_of_what_a_prefix_does(tmp_path):
    _, prefix = made()
    shelf = Shelf(tmp_path)
    for name, changed in (
        ("same", replace(prefix, metadata={"metrics": {"loss": 1.0}})),
        ("moved", replace(prefix, position_offset=1)),
        ("other", made(seed=1)[1]),
    ):
        changed.save(tmp_path / name)
    prefix.save(tmp_path / "first")
    digests = {name: shelf.read(name)[1] for name in shelf.names()}
    assert digests["same"] == digests["first"] and len(set(digests.values())) == 3
