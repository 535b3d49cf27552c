"""Keys and values in few bits and in factors: how far they move, what they take, and what a damaged file says."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import foreword as fw
import zoo
from foreword import _packing, _prefix_file
from foreword.compression import as_stored, halve, low_rank, quantize
from foreword.storage import Packing, Storage

SITE = "model.layers.0.self_attn"
packings = st.builds(
    Packing, bits=st.sampled_from([8, 4]), by=st.sampled_from(["channel", "token"]), group=st.integers(2, 70)
)


def make(length=3, seed=0, name="llama", **more):
    model = zoo.build(name)
    return fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), length, seed), **more)


@st.composite
def states(draw):
    """``(G, P, dim)``: offsets and widths of any size, and channels that stand out."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(0, 70)), draw(st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    numbers = torch.randn(shape, generator=generator) * 10.0 ** draw(st.floats(-6, 4))
    numbers = numbers + 10.0 ** draw(st.floats(-6, 4)) * draw(st.sampled_from([-1, 0, 1]))
    if draw(st.booleans()) and shape[1]:
        numbers[:, :, 0] *= 50
    return numbers.clamp(-65504, 65504)


def widest_step(x, packing):
    """The largest step that any run may have, by the definition."""
    if not x.numel():
        return 0.0
    rows = x.flatten(0, 1) if packing.by == "token" else x.transpose(1, 2).flatten(0, 1)
    runs = math.ceil(rows.shape[1] / packing.group)
    size = math.ceil(rows.shape[1] / runs)
    widest = 0.0
    for row in rows.tolist():
        for start in range(0, len(row), size):
            run = row[start : start + size]
            most = max((max(run) - min(run)) / (2**packing.bits - 1), abs(min(run)) / 512, 2**-15)
            widest = max(widest, most)
    return widest


@settings(max_examples=150)
@given(x=states(), packing=packings)
def test_no_number_moves_by_more_than_half_a_step(x, packing):
    tensors = _packing.pack({"s": x}, "keys", packing)
    back = _packing.unpack(dict(tensors), "keys", packing, {"s": tuple(x.shape)})["s.keys"]
    assert back.shape == x.shape and back.dtype == torch.float32
    if x.numel():
        assert float((back - x).abs().max()) <= widest_step(x, packing) * (0.5 + 2**-8) + 1e-6 * float(x.abs().max())
    assert tensors["packed.keys.codes"].numel() == math.ceil(x.numel() * packing.bits / 8)


@settings(max_examples=150)
@given(x=states(), packing=packings)
def test_packing_what_was_packed_changes_nothing(x, packing):
    shapes = {"s": tuple(x.shape)}
    once = _packing.pack({"s": x}, "values", packing)
    back = _packing.unpack(dict(once), "values", packing, shapes)["s.values"]
    twice = _packing.pack({"s": back}, "values", packing)
    assert once.keys() == twice.keys()
    assert torch.equal(back, _packing.unpack(dict(twice), "values", packing, shapes)["s.values"])


def test_four_bits_hit_the_grid_exactly():
    """Sixteen evenly spaced numbers are what four bits can say."""
    x = (torch.arange(16.0) * 0.25 - 1).view(1, 1, 16)
    tensors = _packing.pack({"s": x}, "keys", Packing(4))
    assert tensors["packed.keys.codes"].tolist() == [0x10 * (i + 1) + i for i in range(0, 16, 2)]
    assert torch.equal(_packing.unpack(tensors, "keys", Packing(4), {"s": (1, 1, 16)})["s.keys"], x)


# ---------------------------------------------------------------- factors


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(1, 20), st.integers(0, 2**31))
def test_factors_are_the_best_of_their_rank(heads, length, dim, rank, seed):
    x = torch.randn(heads, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tensors = _packing.pack({"s": x}, "keys", Packing(rank=rank))
    back = {**tensors, **_packing.unpack(dict(tensors), "keys", Packing(rank=rank), {"s": tuple(x.shape)})}["s.keys"]
    sizes = torch.linalg.svdvals(x.transpose(0, 1).flatten(1))
    saves = min(rank, len(sizes)) * (length + heads * dim) < x.numel()
    expected = sizes[rank:].square().sum().sqrt() if saves else torch.tensor(0.0)
    assert sum(t.numel() for t in tensors.values()) <= x.numel()
    assert float((back - x).norm()) == pytest.approx(float(expected), abs=1e-5 * float(x.norm()))


def test_full_rank_is_exact_and_a_low_one_is_stored_as_factors(tmp_path):
    prefix = make(40)
    assert low_rank(prefix, 40, 40) == prefix
    small = low_rank(prefix, 3)
    assert all(torch.equal(small.values[n], v) for n, v in prefix.values.items()) and small.storage.values.plain
    assert small.stored_nbytes < prefix.stored_nbytes
    back = fw.Prefix.load(small.save(tmp_path / "p"))
    stored = load_file(tmp_path / "p" / "prefix.safetensors")
    assert stored[f"{SITE}.keys.left"].shape == (40, 3) and stored[f"{SITE}.keys.right"].shape == (3, 16)
    for site in prefix.keys:
        torch.testing.assert_close(back.keys[site], small.keys[site], atol=1e-5, rtol=1e-5)
        assert torch.linalg.matrix_rank(back.keys[site].transpose(0, 1).flatten(1)) == 3


# ---------------------------------------------------------------- the file


@settings(max_examples=30)
@given(data=st.data())
def test_a_packed_file_gives_back_what_was_measured(data, tmp_path_factory):
    name = data.draw(st.sampled_from(["llama", "gemma3", "gpt2", "deepseek"]))
    found = fw.sites(zoo.build(name))
    lengths = {s.name: data.draw(st.integers(0, 9)) for s in found} | {found[0].name: data.draw(st.integers(1, 9))}
    prefix = make(lengths, name=name).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    plain = st.just(Packing())
    storage = Storage(data.draw(packings | plain), data.draw(packings | plain))
    small, folder = as_stored(prefix, storage), tmp_path_factory.mktemp("packed") / "p"
    back = fw.Prefix.load(small.save(folder))
    assert back == small and back.storage == storage
    assert back == fw.Prefix.load(prefix.save(folder, storage=storage))
    assert (folder / "prefix.safetensors").stat().st_size == small.stored_nbytes == prefix_size(prefix, storage)
    assert fw.Prefix.load(back.save(folder)) == back  # it stays packed
    assert fw.Prefix.load(back.save(folder, storage="plain")) == back
    assert json.loads((folder / "foreword.json").read_text())["format"] == 1  # as plain as ever


def prefix_size(prefix, storage):
    return replace(prefix, storage=storage).stored_nbytes


def test_four_bits_take_a_seventh_of_the_file(tmp_path):
    prefix = make(64)
    sizes = {}
    for storage in ("plain", "int8", "int4"):
        prefix.save(tmp_path / storage, storage=storage)
        tensors = load_file(tmp_path / storage / "prefix.safetensors")
        sizes[storage] = sum(t.nbytes for t in tensors.values() if t.dtype != torch.float64)
    numbers = prefix.num_parameters
    channels, runs = 2 * 2 * 8, 2 * 2 * 64  # of keys by channel and values by token, at two sites
    assert sizes["plain"] == 4 * numbers
    assert sizes["int8"] == numbers + 4 * (channels + runs) and sizes["int4"] == numbers / 2 + 4 * (channels + runs)


def test_the_packed_prefix_is_used_as_any_other(tmp_path):
    """On the model, in a library, in another dtype, cut and trained further."""
    model, prefix = zoo.build("llama"), make(6)
    small = fw.Prefix.load(prefix.save(tmp_path / "p", storage="int4"))
    assert small != prefix and small.nbytes == prefix.nbytes and small.to(torch.bfloat16).slice(0, 2).longest == 2
    tuning = fw.attach(model, small)
    alone = zoo.logits(model, input_ids=zoo.ids())
    tuning.detach()
    library = fw.Library(model)
    library.add("small", small)
    with library.use("small"):
        torch.testing.assert_close(zoo.logits(model, input_ids=zoo.ids()), alone)
    library.detach()
    tuning = fw.attach(model, small, trainable=True)
    model(input_ids=zoo.ids(), labels=zoo.ids()).loss.backward()
    assert all(p.grad is not None for p in tuning.parameters())
    assert tuning.bake().storage == Storage()


def swap_dtype(t, d):
    t["packed.keys.codes"] = t["packed.keys.codes"].to(torch.int16)


def cut(t, d):
    t["packed.values.codes"] = t["packed.values.codes"][:-1].clone()


def rank_two(t, d):
    t["packed.keys.codes"] = t["packed.keys.codes"].view(2, -1).clone()


def steps(value):
    return lambda t, d: t["packed.keys.steps"].fill_(value)


def storage(kind, **change):
    return lambda t, d: d["storage"][kind].update(change)


DAMAGE = {
    "codes gone": (lambda t, d: t.pop("packed.keys.codes"), "packed.keys.codes' is missing"),
    "starts gone": (lambda t, d: t.pop("packed.values.starts"), "packed.values.starts' is missing"),
    "codes cut": (cut, r"packed.values.codes is torch.uint8 \(47,\), .* ask for torch.uint8 \(48,\)"),
    "codes of another dtype": (swap_dtype, "packed.keys.codes is torch.int16"),
    "codes in two dimensions": (rank_two, r"packed.keys.codes is torch.uint8 \(2, 48\)"),
    "a step of zero": (steps(0.0), "a step that is not above 0"),
    "a step below zero": (steps(-1.0), "a step that is not above 0"),
    "a step that is no number": (steps(float("nan")), "steps has numbers that are not finite"),
    "steps of infinity": (steps(float("inf")), "steps has numbers that are not finite"),
    "three bits": (storage("keys", bits=3), "bits=3; expected 8, 4"),
    "bits as text": (storage("keys", bits="8"), "bits='8'"),
    "other bits": (storage("keys", bits=4), "packed.keys.codes"),
    "another way": (storage("keys", by="row"), "by='row'"),
    "groups of one": (storage("values", group=1), "group=1"),
    "other groups": (storage("values", group=3), "packed.values.starts"),
    "bits and rank": (storage("keys", rank=2), "give one of the two"),
    "an unknown field": (storage("keys", colour="red"), "expected some of"),
    "no storage": (lambda t, d: d.pop("storage"), "is missing"),
    "storage as text": (lambda t, d: d.update(storage="int8"), "storage is 'int8'"),
    "only keys": (lambda t, d: d["storage"].pop("values"), "expected how keys and values are packed"),
    "twice": (lambda t, d: t.update({f"{SITE}.keys": torch.zeros(2, 3, 8)}), "there twice"),
    "another length": (lambda t, d: d["sites"][0].update(length=4), "packed.keys.codes"),
    "a length below zero": (lambda t, d: d["sites"][0].update(length=-3), "whole numbers of 0 or more"),
    "a length in words": (lambda t, d: d["sites"][0].update(length="3"), "whole numbers of 0 or more"),
    "a huge length": (lambda t, d: d["sites"][0].update(length=2**80), "packed.keys.codes"),
    "more heads": (lambda t, d: d["sites"][0].update(kv_heads=3), "packed.keys.codes"),
    "no site": (lambda t, d: d.update(sites=[]), "packed.keys.codes"),
}


def rewrite(folder, change):
    """A description and tensors that agree on the checksum, but on nothing else."""
    tensors = load_file(folder / "prefix.safetensors")
    description = json.loads((folder / "foreword.json").read_text())
    change(tensors, description)
    description["checksum"] = _prefix_file._checksum(tensors)
    save_file(tensors, folder / "prefix.safetensors", metadata={})
    (folder / "foreword.json").write_text(json.dumps(description))


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_packed_folder_is_refused(case, tmp_path):
    change, message = DAMAGE[case]
    folder = make().save(tmp_path / "p", storage=Storage.of("int8", "int4"))
    rewrite(folder, change)
    with pytest.raises(fw.PrefixFileError, match=message):
        fw.Prefix.load(folder)


@pytest.mark.parametrize("case", ["left", "right", "transposed", "dtypes", "twice", "whole numbers"])
def test_damaged_factors_are_refused(case, tmp_path):
    folder = low_rank(make(40), 3, 3).save(tmp_path / "p")
    left, right = f"{SITE}.keys.left", f"{SITE}.keys.right"
    changes = {
        "left": lambda t, d: t.pop(left),
        "right": lambda t, d: t.pop(right),
        "transposed": lambda t, d: t.update({left: t[left].mT.contiguous()}),
        "dtypes": lambda t, d: t.update({left: t[left].half()}),
        "twice": lambda t, d: t.update({f"{SITE}.keys": torch.zeros(2, 40, 8)}),
        "whole numbers": lambda t, d: t.update({left: t[left].long(), right: t[right].long()}),
    }
    rewrite(folder, changes[case])
    with pytest.raises(fw.PrefixFileError, match="keys"):
        fw.Prefix.load(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=5), own, max_size=3),
    max_leaves=4,
)


@settings(max_examples=60)
@given(data=st.data())
def test_no_damage_gives_another_error(data, tmp_path_factory):
    """Anything at all in the description of a packed file, and any tensors: a PrefixFileError, or a prefix."""
    folder = make().save(tmp_path_factory.mktemp("fuzz") / "p", storage="int4")

    def change(tensors, description):
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(tensors)))
            shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
            kind = data.draw(st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.int64]))
            tensors[name] = torch.ones(shape).to(kind)
        else:
            inside = data.draw(st.sampled_from(["storage", "site", "top"]))
            place = {"storage": description["storage"]["keys"], "site": description["sites"][0], "top": description}
            name = data.draw(st.sampled_from(sorted(set(place[inside]) - {"checksum"})))
            place[inside][name] = data.draw(json_values)

    rewrite(folder, change)
    with contextlib.suppress(fw.PrefixFileError):
        fw.Prefix.load(folder)


def test_a_cut_packed_file_says_so(tmp_path):
    folder = make().save(tmp_path / "p", storage="int4")
    whole = (folder / "prefix.safetensors").read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 40)):
        (folder / "prefix.safetensors").write_bytes(whole[:size])
        with pytest.raises(fw.PrefixFileError):
            fw.Prefix.load(folder)


def test_what_few_bits_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    prefix = make()
    for value, said in ((-1e6, "up to 1e\\+06"), (float("nan"), "not finite")):
        keys = {n: k.clone() for n, k in prefix.keys.items()}
        keys[SITE][0, 0, 0] = value
        odd = replace(prefix, keys=keys)
        with pytest.raises(fw.ConfigError, match=rf"{SITE}: the keys have numbers .*{said}"):
            odd.save(tmp_path / "p", storage="int8")
        with pytest.raises(fw.ConfigError, match="float16 can't hold"):
            halve(odd)
    assert not list(tmp_path.iterdir())
    for wrong in ("int3", "int8:row", ""):
        with pytest.raises(fw.ConfigError, match="expected"):
            quantize(prefix, wrong)


def test_files_of_before_are_read(tmp_path):
    """The first format: tensors as they are, the description with indents."""
    prefix = make()
    folder = prefix.save(tmp_path / "p")
    description = (folder / "foreword.json").read_text()
    assert json.loads(description)["format"] == 1 and "storage" not in json.loads(description)
    tensors = load_file(folder / "prefix.safetensors")
    save_file(tensors, folder / "prefix.safetensors", metadata={"format": "pt", "foreword": description})
    assert fw.Prefix.load(folder) == prefix
