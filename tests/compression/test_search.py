"""The search: what it tries, that nothing over a limit is ever chosen, that what is saved is what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_tokens import dataset, make, said

import foreword as fw
import zoo
from foreword.compression import held_out_loss, search
from foreword.compression.planning import (
    METHODS,
    QUICK,
    Candidate,
    Limits,
    Numbers,
    Plan,
    best,
    nearest,
    quick_plans,
    size_of,
    ways_to_write,
)
from foreword.data import EncodedDataset, EncodeStats
from foreword.storage import Storage

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def llama():
    return make(length=60)


def compress(model, prefix, **limits):
    more = {"console": QUIET, "batch_size": 8, **limits}
    return fw.compress(model, zoo.tokenizer(), prefix, dataset(6, 1), dataset(6, 2), **more)


# ---------------------------------------------------------------- the loss


def test_the_held_out_loss_is_the_models_own(llama):
    """Against the loss that the model computes for each example by itself."""
    model, prefix = llama
    data = dataset(5)
    found = held_out_loss(model, zoo.tokenizer(), prefix, data, batch_size=2)
    tuning = fw.attach(model, prefix)
    for i, (loss, tokens) in enumerate(zip(found.examples, found.tokens, strict=True)):
        ids = torch.tensor([data[i]["input_ids"]])
        with torch.no_grad():
            own = float(model(input_ids=ids, labels=torch.tensor([data[i]["labels"]])).loss)
        assert tokens == ids.shape[1] - 1 and loss / tokens == pytest.approx(own, abs=1e-5)
    tuning.detach()
    assert found.mean == pytest.approx(sum(found.examples) / sum(found.tokens))
    base = held_out_loss(model, zoo.tokenizer(), None, data)
    assert base.mean != found.mean and found.above(found) == (0, 0)
    rise, error = base.above(found)
    assert rise == pytest.approx(base.mean - found.mean) and error > 0


# ---------------------------------------------------------------- choosing

numbers = st.floats(-1, 5) | st.just(math.nan) | st.just(math.inf)
candidates = st.lists(
    st.builds(
        Candidate,
        st.just(Plan(Numbers(""))),
        st.integers(1, 100),
        st.just(0),
        numbers,
        numbers,
        st.just(0.0),
        st.just(0.0),
    ),
    max_size=8,
)


@given(candidates, st.none() | st.integers(1, 100), st.none() | st.floats(0, 3))
def test_what_is_chosen_is_within_the_limits_and_the_best_of_these(tried, target, rise):
    limits = Limits(target, rise, 60)
    chosen = best(tried, limits)
    most, highest = target if target is not None else 59, rise if rise is not None else 1e9
    within = [c for c in tried if c.nbytes <= most and c.increase <= highest]
    assert (chosen is None) == (not within)
    if chosen is not None:
        assert chosen in within
        assert all(chosen.nbytes <= c.nbytes if target is None else not c.loss < chosen.loss for c in within)
    for c in nearest(tried, limits):
        assert c.nbytes <= most or c.increase <= highest


@settings(max_examples=6)
@given(share=st.floats(0.25, 0.95), rise=st.none() | st.sampled_from([0.0, 0.001, 0.02, 0.2]))
def test_a_search_keeps_to_its_limits(share, rise, llama, tmp_path_factory):
    """Measured again from the file that it left."""
    model, prefix = llama
    out, target = tmp_path_factory.mktemp("search") / "small", int(share * prefix.stored_nbytes)
    found = compress(model, prefix, target_bytes=target, max_loss_increase=rise, out=out)
    assert all(c.nbytes > target or c.increase > rise for c in found.candidates) if found.best is None else True
    assert (out / "plans.png").is_file() and json.loads((out / "plans.json").read_text()) == found.to_json()
    if found.best is None:
        assert found.prefix is None and not (out / "foreword.json").exists() and found.nearest
        return
    assert (out / "prefix.safetensors").stat().st_size == found.best.nbytes <= target
    before, after = (held_out_loss(model, zoo.tokenizer(), p, dataset(6, 2)) for p in (prefix, fw.Prefix.load(out)))
    assert after.mean - before.mean == pytest.approx(found.best.increase, abs=1e-4)
    assert rise is None or after.mean - before.mean <= rise + 1e-4
    assert fw.Prefix.load(out).metadata["compression"]["plan"] == found.best.plan.name


def test_without_a_target_the_smallest_within_the_loss(llama):
    model, prefix = llama
    found = compress(model, prefix, max_loss_increase=0.05)
    within = [c for c in found.candidates if c.increase <= 0.05]
    assert found.best is not None and found.best.nbytes == min(c.nbytes for c in within) < prefix.stored_nbytes
    assert found.prefix is not None and found.prefix.stored_nbytes == found.best.nbytes
    none = compress(model, prefix, max_loss_increase=0.0, methods=("prune",))
    assert none.best is None or none.best.increase <= 0


# ---------------------------------------------------------------- what is tried


def test_each_way_alone_and_every_two_together(llama):
    _, prefix = llama
    target = int(0.5 * prefix.stored_nbytes)
    names = [p.name for p in quick_plans(prefix, QUICK, Limits(target, None, prefix.stored_nbytes))]
    assert names[:5] == ["float16", "int8", "int8 keys and int4 values", "int4 keys and int8 values", "int4"]
    assert len(names) == len(set(names))
    for way in ("prune", "prune uniformly", "merge"):
        assert {f"{way} to {n}" for n in (45, 30, 15)} <= set(names)
        assert any(n.startswith(f"{way} to") and n.endswith("float16") for n in names)
    assert {"rank 45", "rank 30", "rank 15"} <= set(names)
    assert not any(n.endswith(" to 60") or " to 0" in n for n in names)
    few = [p.name for p in quick_plans(prefix, ("merge", "int4"), Limits(target, None, prefix.stored_nbytes))]
    assert all("prune" not in n and "float16" not in n and "int8" not in n and "rank" not in n for n in few)


@settings(max_examples=6)
@given(share=st.floats(0.2, 0.9))
def test_as_many_tokens_as_fit_and_not_one_more(share, llama):
    _, prefix = llama
    limits = Limits(int(share * prefix.stored_nbytes), None, prefix.stored_nbytes)
    for numbers in ways_to_write(prefix, QUICK):
        plans = [p for p in quick_plans(prefix, QUICK, limits) if p.numbers == numbers and p.shorter == "merge"]
        fitting = [p for p in plans if size_of(prefix, p) <= limits.target_bytes]
        if size_of(prefix, Plan(numbers)) <= limits.target_bytes or not fitting:
            continue
        most = max(fitting, key=lambda p: p.tokens)
        assert most.tokens == 59 or size_of(prefix, replace(most, tokens=most.tokens + 1)) > limits.target_bytes


def test_a_packed_or_halved_prefix_is_compressed_further(llama):
    model, prefix = llama
    packed = search.Prefix.to(prefix, torch.float32)
    packed = replace(packed, storage=Storage.of("int8"))
    names = [n.name for n in ways_to_write(packed, QUICK)]
    assert "int8" not in names and "float16" not in names and "int4" in names
    assert "float16" not in [n.name for n in ways_to_write(prefix.to(torch.bfloat16), QUICK)]
    found = compress(model, packed, target_bytes=int(0.8 * packed.stored_nbytes))
    assert found.best is not None and found.best.nbytes <= 0.8 * packed.stored_nbytes
    assert any(c.plan.name == "prune to 30" and c.nbytes < packed.stored_nbytes for c in found.candidates)


def test_memories_gates_and_weights_stay_as_they_are():
    """They are carried, counted and measured; only keys and values get smaller."""
    model = zoo.build("llama")
    configs = [
        fw.PrefixConfig(length=60, init="random", gate="head"),
        fw.MemoryConfig(rank=2),
        fw.AdapterConfig(width=4),
    ]
    tuning = fw.attach(model, configs)
    generator = torch.Generator().manual_seed(0)
    for parameter in tuning.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    prefix = tuning.bake()
    tuning.detach()
    found = compress(model, prefix, max_loss_increase=0.5, methods=("int4", "int8", "prune", "merge"))
    assert found.best is not None and found.prefix is not None
    for name in ("bias", "memory", "memory_up", "weights"):
        before, after = getattr(prefix, name), getattr(found.prefix, name)
        assert before and before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert found.best.nbytes > sum(t.nbytes for t in prefix.weights.values())
    assert not torch.equal(said(model, found.prefix), said(model, prefix))


def test_an_encoder_decoder_with_lengths_of_its_own():
    model = zoo.build("t5")
    found = fw.sites(model)
    lengths = {s.name: 20 + 10 * (i % 3) for i, s in enumerate(found)}
    prefix = fw.Prefix.from_tensors(model, zoo.random_prefix(model, found, lengths))
    target = int(0.35 * prefix.stored_nbytes)
    result = compress(model, prefix, target_bytes=target)
    assert result.best is not None and result.prefix is not None and result.prefix.stored_nbytes <= target
    for candidate in result.candidates:
        if candidate.plan.name.startswith("prune") and candidate.plan.numbers.name == "":
            assert (
                candidate.memory_nbytes == sum(min(n, candidate.plan.tokens) for n in lengths.values()) * 4 * 8 * 2 * 4
            )


# ---------------------------------------------------------------- errors first


def refused(llama, error, message, *, prefix=None, model=None, data=None, valid=None, **limits):
    own, whole = llama
    own = model or own
    with pytest.raises(error, match=message):
        fw.compress(
            own, zoo.tokenizer(), prefix or whole, dataset(3) if data is None else data,
            dataset(3) if valid is None else valid, console=QUIET, **({"target_bytes": 9000} | limits),
        )  # fmt: skip
    assert not hasattr(own, "foreword")


def test_refusals(llama, tmp_path):
    _, prefix = llama
    size, nothing = prefix.stored_nbytes, EncodedDataset([], [], EncodeStats(0, 0, 0, 0, 0, 0))
    unlabelled = EncodedDataset([[4, 5]], [[-100, -100]], EncodeStats(1, 0, 0, 0, 0, 0))
    config = fw.ConfigError
    refused(llama, config, "needs a limit", target_bytes=None)
    refused(llama, config, r"one virtual token at each of 2 sites the file takes [\d,]+ \(float16\)", target_bytes=1000)
    refused(llama, config, r"one virtual token .* \(as it is\)", target_bytes=1000, methods=("prune",))
    refused(llama, config, "above 0", target_bytes=0)
    refused(llama, config, f"takes {size:,} already, so there is nothing to do", target_bytes=size)
    for rise in (-0.1, math.nan, math.inf):
        refused(llama, config, "expected 0 or more nats a token", max_loss_increase=rise)
    refused(llama, config, "'prunes' is no method; expected some of half, int8", methods=("prunes",))
    refused(llama, config, "no method is named", methods=())
    refused(llama, config, "keeps checkpoints: give out=", methods=METHODS)
    refused(llama, fw.DataError, "no example to measure", data=nothing)
    refused(llama, fw.DataError, "none of the 0 held-out examples", valid=nothing)
    refused(llama, fw.DataError, "none of the 1 held-out examples", valid=unlabelled)
    out = tmp_path / "out"
    refused(llama, fw.MismatchError, "other weights", model=zoo.build("llama", seed=3), out=out)
    refused(llama, fw.MismatchError, "doesn't fit", model=zoo.build("gpt2"), out=out)
    assert not out.exists()
    (tmp_path / "file").write_text("mine")
    refused(llama, config, "is a file", out=tmp_path / "file")
    prefix.save(tmp_path / "old")
    refused(llama, config, "holds a prefix already", out=tmp_path / "old")
    refused(llama, config, "holds no search that was begun", out=out, resume=True)


def test_what_has_no_tokens_of_its_own_is_refused(llama):
    model, _ = llama
    makers = {
        "depends on a condition vector": fw.PrefixConfig(length=3, init="random", reparam="mlp", hidden=8, condition=2),
        "only a memory": fw.MemoryConfig(rank=2),
        "only adapter": fw.AdapterConfig(width=4),
    }
    for message, config in makers.items():
        tuning = fw.attach(model, config)
        prefix = tuning.bake()
        tuning.detach()
        refused(llama, fw.ConfigError, message, prefix=prefix)
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", visible=lambda positions: positions > 2))
    prefix = tuning.bake()
    tuning.detach()
    refused(llama, fw.ConfigError, "can't be saved", prefix=prefix)
    tuning = fw.attach(model, [fw.PrefixConfig(length=9, init="random"), fw.MemoryConfig(rank=2)])
    prefix = tuning.bake()
    tuning.detach()
    refused(llama, fw.ConfigError, "brings a memory, which a distillation would train", prefix=prefix,
            target_bytes=int(0.9 * prefix.stored_nbytes), methods=METHODS)  # fmt: skip


# ---------------------------------------------------------------- broken off


def test_a_search_that_was_broken_off_goes_on(llama, tmp_path, monkeypatch):
    model, prefix = llama
    limits = {"target_bytes": int(0.3 * prefix.stored_nbytes)}
    whole = compress(model, prefix, out=tmp_path / "whole", **limits)
    measured, real = [], search.held_out_loss

    def until(most):
        def measure(*args, **kwargs):
            if len(measured) == most:
                raise KeyboardInterrupt
            measured.append(args)
            return real(*args, **kwargs)

        return measure

    monkeypatch.setattr(search, "held_out_loss", until(6))
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        compress(model, prefix, out=out, **limits)
    assert not (out / "foreword.json").exists() and not hasattr(model, "foreword")
    assert len(json.loads((out / "plans.json").read_text())["plans"]) == 5
    monkeypatch.setattr(search, "held_out_loss", real)
    with pytest.raises(fw.ConfigError, match="pass --resume to go on"):
        compress(model, prefix, out=out, **limits)
    with pytest.raises(fw.ConfigError, match="begun with another limits"):
        compress(model, prefix, out=out, resume=True, target_bytes=limits["target_bytes"] + 1)
    measured.clear()
    monkeypatch.setattr(search, "held_out_loss", until(1000))
    rest = compress(model, prefix, out=out, resume=True, **limits)
    assert len(measured) == 1 + len(whole.candidates) - 5  # the loss before, and what was missing
    assert [(c.plan, c.nbytes, c.loss) for c in rest.candidates] == [
        (c.plan, c.nbytes, c.loss) for c in whole.candidates
    ]
    assert rest.best.plan == whole.best.plan and fw.Prefix.load(out) == fw.Prefix.load(tmp_path / "whole")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "plans.json").write_text("[")
    with pytest.raises(fw.ConfigError, match=r"plans.json can't be read"):
        compress(model, prefix, out=tmp_path / "odd", **limits)
