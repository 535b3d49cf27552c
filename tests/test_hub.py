"""Prefixes on a model hub: huggingface_hub's own client, and a hub on this machine."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.errors import ConfigError, PrefixFileError, StoreError
from foreword.hub import Address, located


def made(seed=0, length=3):
    model = zoo.build("llama")
    return fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), length, seed))


def same(a, b):
    return all(torch.equal(x[n], y[n]) for x, y in ((a.keys, b.keys), (a.values, b.values)) for n in x)


def test_what_is_pushed_is_what_is_loaded(hub):
    first, second = made(0), made(1)
    version = first.push_to_hub("me/reviews", private=True)
    assert version == f"hf://me/reviews@{hub.branches['me/reviews']['main']}" and hub.private == {"me/reviews"}
    assert same(fw.Prefix.load("hf://me/reviews"), first)
    again = second.push_to_hub("hf://me/reviews", message="better")
    assert len(hub.commits["me/reviews"]) == 3  # the empty one, and one for each version
    assert same(fw.Prefix.load("hf://me/reviews"), second)
    assert same(fw.Prefix.load(version), first) and same(fw.Prefix.load(again), second)
    files = hub.commits["me/reviews"][hub.branches["me/reviews"]["main"]]
    card = files["README.md"].decode()
    assert "# reviews\n" in card and "fw.Prefix.load('hf://me/reviews')" in card and "library_name: foreword" in card
    assert set(files) == {".gitattributes", "README.md", "foreword.json", "prefix.safetensors"}


def test_many_prefixes_in_one_repository_and_nothing_else_is_fetched(hub):
    prefixes = {f"tasks/[{i}]": made(i, i + 1) for i in range(3)}
    for folder, prefix in prefixes.items():
        prefix.push_to_hub(f"me/all/{folder}")
    hub.commit("me/all", "main", {"tasks/[0]/model.bin": b"large", "README.md": b"# Ours"})
    hub.asked.clear()
    for folder, prefix in prefixes.items():
        assert same(fw.Prefix.load(f"hf://me/all/{folder}"), prefix)
    fetched = {path.split("/", 5)[-1] for method, path in hub.asked if "/resolve/" in path}
    assert fetched == {f"{f}/{n}" for f in prefixes for n in ("README.md", "foreword.json", "prefix.safetensors")}


def test_what_was_fetched_is_read_without_the_hub(hub, monkeypatch):
    prefix = made()
    prefix.push_to_hub("me/reviews")
    fw.Prefix.load("hf://me/reviews")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert same(fw.Prefix.load("hf://me/reviews"), prefix)
    with pytest.raises(StoreError, match=r"hf://me/other can't be fetched: .*HF_HUB_OFFLINE"):
        fw.Prefix.load("hf://me/other")
    with pytest.raises(StoreError, match=r"hf://me/reviews can't be pushed: .*HF_HUB_OFFLINE"):
        prefix.push_to_hub("me/reviews")


def test_branches(hub):
    made(0).push_to_hub("me/reviews")
    hub.branches["me/reviews"]["longer"] = hub.branches["me/reviews"]["main"]
    made(1, 5).push_to_hub("me/reviews@longer")
    assert fw.Prefix.load("hf://me/reviews@longer").longest == 5 and fw.Prefix.load("hf://me/reviews").longest == 3
    with pytest.raises(StoreError, match="me/reviews has no revision 'none'; expected a branch"):
        fw.Prefix.load("hf://me/reviews@none")
    with pytest.raises(StoreError, match="me/reviews has no revision 'none'"):
        made().push_to_hub("me/reviews@none")


def test_what_is_no_prefix_or_somebody_elses(hub, monkeypatch):
    hub.create("me/model")
    hub.commit("me/model", "main", {"README.md": b"# A model", "config.json": b"{}"})
    before = dict(hub.branches["me/model"])
    with pytest.raises(ConfigError, match=r"holds a README.md but no prefix.*hf://me/model/FOLDER"):
        made().push_to_hub("me/model")
    assert hub.branches["me/model"] == before
    with pytest.raises(PrefixFileError, match=r"hf://me/model holds no prefix.safetensors"):
        fw.Prefix.load("hf://me/model")
    with pytest.raises(StoreError, match=r"can't be pushed: the hub says 403 .*log in"):
        made().push_to_hub("others/reviews")
    with pytest.raises(StoreError, match="the hub has no me/none that this token may see; check its name, or log in"):
        fw.Prefix.load("hf://me/none")
    hub.create("me/secret", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StoreError, match="the hub has no me/secret that this token may see"):
        fw.Prefix.load("hf://me/secret")
    with pytest.raises(StoreError, match=r"can't be pushed.*log in"):
        made().push_to_hub("me/reviews")


def test_a_damaged_file_is_refused(hub):
    made().push_to_hub("me/reviews")
    hub.commit("me/reviews", "main", {"prefix.safetensors": b"nonsense"})
    with pytest.raises(PrefixFileError, match="can't be read as safetensors"):
        fw.Prefix.load("hf://me/reviews")


def test_a_hub_that_is_not_there(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for doing in (lambda: fw.Prefix.load("hf://me/reviews"), lambda: made().push_to_hub("me/reviews")):
        with pytest.raises(StoreError, match="hf://me/reviews can't be"):
            doing()


NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True).filter(lambda n: n not in ("models", ".."))


@given(NAME, NAME, st.none() | NAME | st.just("refs/pr/3"), st.lists(NAME, max_size=3).map("/".join))
def test_addresses_are_read_as_they_are_written(owner, name, revision, folder):
    if owner in ("datasets", "spaces", "buckets", "kernels"):
        return
    address = Address(f"{owner}/{name}", revision, folder)
    assert Address.of(str(address)) == address == Address.of(str(address).replace("hf://", "hf:/"))
    assert Address.of(str(address).replace("hf://", "")) == address


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://me",
        "hf:///x",
        "hf://me/x@",
        "hf://me/../x/y",
        "hf://me/x/y@z",
        "hf://datasets/me/x",
        "hf://a b/c",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(ConfigError, match=r"expected hf://OWNER/NAME|is no address|repositories of models"):
        located(text)


def test_folders_are_folders(tmp_path):
    assert located(tmp_path) == tmp_path and located("me/reviews").as_posix() == "me/reviews"
    with pytest.raises(PrefixFileError, match=r"me/reviews is not a folder; expected one .* or hf://OWNER/NAME"):
        fw.Prefix.load("me/reviews")
