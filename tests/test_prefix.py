"""Prefix: where it comes from, its file, its changed copies, and whether it fits a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import foreword as fw
import zoo
from foreword import _prefix_file


def make(model, length=3, seed=0, **kwargs):
    return fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), length, seed), **kwargs)


@pytest.fixture
def llama():
    return zoo.build("llama")


# ---------------------------------------------------------------- what is in it


def test_lengths_bytes_and_numbers(llama):
    names = [s.name for s in fw.sites(llama)]
    prefix = make(llama, {names[0]: 3, names[1]: 5})
    assert [prefix.length(n) for n in names] == [3, 5] and prefix.longest == 5
    assert prefix.keys[names[1]].shape == prefix.values[names[1]].shape == (2, 5, 8)
    assert prefix.num_parameters == 8 * 2 * (8 + 8) and prefix.nbytes == 4 * prefix.num_parameters
    assert prefix.to(torch.bfloat16).nbytes == 2 * prefix.num_parameters
    assert "3-5 virtual tokens at 2 sites" in repr(prefix)
    with pytest.raises(fw.MismatchError, match=r"nothing at 'model\.layers\.7'"):
        prefix.length("model.layers.7")


def test_equality_is_to_the_bit(llama):
    prefix, same = make(llama), make(llama)
    assert prefix == same and prefix != make(llama, seed=1) and prefix != "prefix"
    assert prefix != prefix.to(torch.float16)
    assert prefix != make(llama, position_offset=3)
    first = next(iter(same.keys.values()))
    first.view(-1)[0] = torch.nextafter(first.view(-1)[0], torch.tensor(9.0))
    assert prefix != same


def test_slice_and_join_are_inverse_in_a_model_without_rotation():
    prefix = make(zoo.build("gpt2"), 5)
    assert prefix.slice(0, 2).join(prefix.slice(2)) == prefix
    assert prefix.slice(-2).longest == 2
    with pytest.raises(fw.ConfigError, match=r"slice\(7, None\) leaves no virtual token of 5"):
        prefix.slice(7)


def test_joined_texts_stand_where_they_stood(llama):
    """A long text cut in two: the first part's keys are moved before the second's, as if read together."""
    tokenizer, text = zoo.tokenizer(), zoo.SENTENCES[0]
    whole = fw.Prefix.from_text(llama, tokenizer, text)
    length = whole.longest
    first, second = whole.slice(0, 4), whole.slice(4)
    first = first.shift(length - 4).shift(0)  # on its own it would stand right before the text
    stands_alone = fw.Prefix.from_tensors(llama, {n: (first.keys[n], first.values[n]) for n in first.keys})
    joined = stands_alone.join(second)
    for name in whole.keys:
        torch.testing.assert_close(joined.keys[name], whole.keys[name], atol=1e-5, rtol=1e-5)
        assert torch.equal(joined.values[name], whole.values[name])


def test_join_refuses_what_does_not_go_together(llama):
    prefix = make(llama)
    name = next(iter(prefix.keys))
    part = fw.Prefix.from_tensors(llama, {name: (prefix.keys[name], prefix.values[name])})
    with pytest.raises(fw.MismatchError, match="different attention sites"):
        prefix.join(part)
    with pytest.raises(fw.MismatchError, match="positions 0 and 3"):
        prefix.join(make(llama, position_offset=3))
    gated = fw.Prefix(prefix.keys, prefix.values, prefix.sites, bias={name: torch.zeros(4)})
    with pytest.raises(fw.MismatchError, match="gates"):
        prefix.join(gated)


@pytest.mark.parametrize("name", zoo.ROTARY)
def test_a_shifted_prefix_says_the_same(name):
    model, ids = zoo.build(name), zoo.ids()
    prefix = make(model)
    with_prefix = []
    for moved in (prefix, prefix.shift(9), prefix.shift(9).shift(-9)):
        tuning = fw.attach(model, moved)
        with_prefix.append(zoo.logits(model, input_ids=ids))
        tuning.detach()
    torch.testing.assert_close(with_prefix[1], with_prefix[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(with_prefix[2], with_prefix[0], atol=1e-4, rtol=1e-4)
    assert prefix.shift(9).position_offset == 9
    with pytest.raises(fw.MismatchError, match=r"start at -1"):
        prefix.shift(-1)


def test_from_tensors_refuses_unknown_names_and_wrong_shapes(llama):
    tensors = zoo.random_prefix(llama, fw.sites(llama))
    name, (keys, values) = next(iter(tensors.items()))
    for change, message in (
        ({"lm_head": (keys, values)}, "no attention site 'lm_head'"),
        ({name: (keys[:1], values)}, r"keys have shape \(1, 3, 8\), expected \(kv_heads 2"),
        ({name: (keys, values[..., :5])}, "values have shape"),
        ({name: (keys, values[:, :2])}, "3 keys but 2 values"),
        ({name: (keys.long(), values)}, "int64, expected a floating-point"),
        ({name: (keys[0], values)}, "keys have shape"),
    ):
        with pytest.raises(fw.MismatchError, match=message):
            fw.Prefix.from_tensors(llama, change)


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "deepseek", "gemma3", "vit"])
def test_a_saved_prefix_gives_the_same_logits(name, tmp_path):
    model, arguments = zoo.build(name), zoo.inputs(name)
    tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random"), example_inputs=arguments)
    prefix = tuning.bake()
    tuning.detach()
    outs = []
    for p in (prefix, fw.Prefix.load(prefix.save(tmp_path / "p"))):
        tuning = fw.attach(model, p)
        outs.append(zoo.logits(model, **arguments))
        tuning.detach()
    assert torch.equal(*outs) and not torch.equal(outs[0], zoo.logits(model, **arguments))
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["README.md", "foreword.json", "prefix.safetensors"]


@settings(max_examples=25)
@given(data=st.data())
def test_round_trip(data, tmp_path_factory):
    model = zoo.build(data.draw(st.sampled_from(["llama", "gemma3", "gpt2"])))
    found = fw.sites(model)
    lengths = {s.name: data.draw(st.integers(0, 4)) for s in found}
    if not any(lengths.values()):
        lengths[found[0].name] = 1
    prefix = make(model, lengths, position_offset=data.draw(st.integers(0, 9)))
    prefix = prefix.to(data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    extra = {found[0].name: torch.randn(found[0].heads)}
    kind = data.draw(st.sampled_from([None, "bias", "gates"]))
    if kind:
        prefix = fw.Prefix(**{**prefix.__dict__, kind: extra})
    back = fw.Prefix.load(prefix.save(tmp_path_factory.mktemp("round") / "p"))
    assert back == prefix and back.sites == list(prefix.sites) and back.fingerprint == prefix.fingerprint
    assert {n: r.start for n, r in back.rotations.items()} == {n: r.start for n, r in prefix.rotations.items()}
    assert all(r.equals(prefix.rotations[n]) for n, r in back.rotations.items())


def change_json(folder, change):
    path = folder / "foreword.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def change_tensors(folder, change):
    path = folder / "prefix.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={})


SITE = "model.layers.0.self_attn"


def swap(tensors):
    tensors[f"{SITE}.keys"] = tensors[f"{SITE}.keys"].transpose(0, 1).contiguous()


DAMAGE = {
    "weights gone": (lambda f: (f / "prefix.safetensors").unlink(), "holds no prefix.safetensors"),
    "description gone": (lambda f: (f / "foreword.json").unlink(), "holds no foreword.json"),
    "weights cut": (lambda f: os.truncate(f / "prefix.safetensors", 700), "can't be read as safetensors"),
    "weights empty": (lambda f: os.truncate(f / "prefix.safetensors", 0), "can't be read as safetensors"),
    "not JSON": (lambda f: (f / "foreword.json").write_text("{"), "not valid JSON"),
    "not text": (lambda f: (f / "foreword.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "a list": (lambda f: (f / "foreword.json").write_text("[]"), "format None"),
    "a later format": (lambda f: change_json(f, lambda d: d.update(format=99)), "format 99; .* reads format 1"),
    "a changed tensor": (lambda f: change_tensors(f, lambda t: t[f"{SITE}.keys"].add_(1)), "checksum"),
    "a swapped shape": (lambda f: change_tensors(f, swap), "checksum"),
    "a lost tensor": (lambda f: change_tensors(f, lambda t: t.pop(f"{SITE}.keys")), "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_says_what_is_wrong(damage, llama, tmp_path):
    apply, message = DAMAGE[damage]
    folder = make(llama).save(tmp_path / "p")
    apply(folder)
    with pytest.raises(fw.PrefixFileError, match=message):
        fw.Prefix.load(folder)


def rewrite(folder, change):
    """A description and tensors that agree on the checksum, but on nothing else."""
    tensors = load_file(folder / "prefix.safetensors")
    description = json.loads((folder / "foreword.json").read_text())
    change(tensors, description)
    description["checksum"] = _prefix_file._checksum(tensors)
    save_file(tensors, folder / "prefix.safetensors", metadata={})
    (folder / "foreword.json").write_text(json.dumps(description))


INCONSISTENT = {
    "not a number": (lambda t, d: t[f"{SITE}.keys"].fill_(float("nan")), "keys has numbers that are not finite"),
    "infinite": (lambda t, d: t[f"{SITE}.values"].fill_(float("inf")), "values has numbers that are not finite"),
    "missing keys": (lambda t, d: t.pop(f"{SITE}.keys"), "is missing"),
    "missing entry": (lambda t, d: d.pop("sites"), "'sites' is missing"),
    "missing rotation": (lambda t, d: t.pop("rotary.0.inv_freq"), "is missing"),
    "wrong layout": (lambda t, d: d["rotations"][0].update(layout="spiral"), "spiral"),
    "other shape": (lambda t, d: swap(t), "keys have shape"),
    "other heads": (lambda t, d: d["sites"][0].update(kv_heads=7), "kv_heads 7"),
    "other length": (lambda t, d: d["sites"][0].update(length=7), "has 3 tokens but foreword.json says 7"),
    "no sites": (lambda t, d: d.update(sites=None), "don't fit together"),
    "a site of text": (lambda t, d: d.update(sites=["x"]), "don't fit together"),
    "an odd rotation": (lambda t, d: d["sites"][0].update(rotation=5), "."),
    "an odd offset": (lambda t, d: d.update(position_offset="soon"), "don't fit together"),
    "an odd fingerprint": (lambda t, d: d.update(fingerprint={"who": 1}), "don't fit together"),
    "odd metadata": (lambda t, d: d.update(metadata=3), "don't fit together"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_an_inconsistent_folder_is_refused(case, llama, tmp_path):
    change, message = INCONSISTENT[case]
    folder = make(llama).save(tmp_path / "p")
    rewrite(folder, change)
    with pytest.raises(fw.PrefixFileError, match=message):
        fw.Prefix.load(folder)


def test_a_loaded_prefix_outlives_its_file(llama, tmp_path):
    """Whatever is written over the file does not reach numbers that are in use."""
    saved = make(llama, 3)
    saved.save(tmp_path / "p")
    loaded, path = fw.Prefix.load(tmp_path / "p"), tmp_path / "p" / "prefix.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.truncate(0)
    assert loaded == saved


def test_missing_folder_and_file_in_the_way(llama, tmp_path):
    with pytest.raises(fw.PrefixFileError, match="is not a folder"):
        fw.Prefix.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(fw.PrefixFileError, match="is a file"):
        make(llama).save(tmp_path / "file")
    with pytest.raises(fw.PrefixFileError, match="can't save"):
        make(llama).save(tmp_path / "file" / "deeper")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    with pytest.raises(fw.PrefixFileError, match=r"holds a README\.md but no prefix"):
        make(llama).save(tmp_path / "project")
    assert (tmp_path / "project" / "README.md").read_text() == "mine"


def test_overwriting(llama, tmp_path):
    old, new = make(llama), make(llama, 5, seed=1)
    folder = old.save(tmp_path / "p")
    (folder / "report.html").write_text("kept")
    with pytest.raises(fw.PrefixFileError, match="already holds a prefix"):
        new.save(folder, overwrite=False)
    assert fw.Prefix.load(folder) == old
    new.save(folder)
    assert fw.Prefix.load(folder) == new and (folder / "report.html").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["p"]  # nothing staged is left


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_save_cut_short_loses_nothing(survivors, llama, tmp_path, monkeypatch):
    old, new = make(llama), make(llama, 5, seed=1)
    folder = old.save(tmp_path / "p")
    replaced, done = Path.replace, []

    def replace(*args):
        if len(done) == survivors:
            raise OSError("the power is gone")
        done.append(args)
        return replaced(*args)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(fw.PrefixFileError, match="power"):
        new.save(folder)
    assert fw.Prefix.load(folder) == (new if survivors else old)


# ---------------------------------------------------------------- does it fit


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit"])
def test_other_weights_are_noticed_and_force_overrides_them(name):
    model, other = zoo.build(name), zoo.build(name, seed=1)
    tuning = fw.attach(model, fw.PrefixConfig(length=2, init="random"), example_inputs=zoo.inputs(name))
    prefix = tuning.bake()
    with pytest.raises(fw.MismatchError, match=r"other weights .*begins .* there and .* here.*force=True"):
        fw.attach(other, prefix)
    fw.attach(other, prefix, force=True).detach()
    for dtype in (torch.bfloat16, torch.float16):
        fw.attach(zoo.build(name).to(dtype), prefix)


def test_other_shapes_are_refused_even_with_force(llama):
    prefix = make(llama)
    for other, message in (
        ("gpt2", "no attention site"),
        ("deepseek", "4 key/value heads of 16/12"),
        ("qwen3next", "no att"),
    ):
        for force in (False, True):
            with pytest.raises(fw.MismatchError, match=rf"LlamaForCausalLM.*doesn't fit.*{message}"):
                fw.attach(zoo.build(other), prefix, force=force)
