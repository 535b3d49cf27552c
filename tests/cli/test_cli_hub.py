"""`foreword push`, and addresses of a hub where other commands ask for a folder."""

from __future__ import annotations

import json

import pytest
from looking_cli import baked_in

import foreword as fw
import hubs
from foreword.exchange.peft import CONFIG, WEIGHTS, write_peft


@pytest.fixture
def saved(folder, tmp_path):
    return baked_in(folder, tmp_path / "film", 4)


def test_a_pushed_prefix_is_used_by_its_address(hub, run, saved, folder, data, tmp_path):
    code, out, err = run("push", saved, "hf://me/film", "--private", "--message", "the first", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["address"] == "hf://me/film" and told["version"].startswith("hf://me/film@")
    assert hub.private == {"me/film"}
    writes = ("generate", "--model", folder, "--prompt", "The film", "--json", "--max-new-tokens", 5)
    assert run(*writes, "--prefix", told["version"]) == run(*writes, "--prefix", saved)
    code, out, err = run("inspect", "hf://me/film", "--json")
    assert code == 0 and json.loads(out)["file_bytes"] == (saved / "prefix.safetensors").stat().st_size, err
    code, out, err = run("inspect", "hf://me/film")
    assert code == 0 and out.startswith("hf://me/film: Prefix(4 virtual tokens") and err == ""
    code, out, err = run("look", "hf://me/film", "--model", folder, "--text", "The film is fine.", "--only", "words",
                         "--out", tmp_path / "look.html")  # fmt: skip
    assert code == 0 and ": hf://me/film on 1 texts" in out, err
    code, out, err = run("eval", "--model", folder, "--prefix", "hf://me/film", "--data", data, "--metrics", "chrf",
                         "--limit", 2, "--max-new-tokens", 3, "--json")  # fmt: skip
    assert code == 0, err
    code, out, err = run("train", "--model", folder, "--data", data, "--start", "hf://me/film", "--out",
                         tmp_path / "on", "--steps", 1, "--batch-size", 2)  # fmt: skip
    assert code == 0 and fw.Prefix.load(tmp_path / "on").longest == 4, err
    code, out, err = run("push", saved, "me/film")
    assert code == 0 and "hf://me/film: pushed, as hf://me/film@" in out, err


def test_an_adapter_of_peft_is_imported_from_a_hub(hub, run, saved, folder, tmp_path):
    adapter = write_peft(fw.Prefix.load(saved), fw.load_model(folder)[0], tmp_path / "adapter")
    hub.create("somebody/adapter")
    hub.commit("somebody/adapter", "main", {name: (adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    code, _, err = run("import", "hf://somebody/adapter", "--model", folder, "--out", tmp_path / "own")
    assert code == 0 and fw.Prefix.load(tmp_path / "own").longest == 4, err
    hub.create("somebody/else")
    code, _, err = run("import", "hf://somebody/else", "--model", folder, "--out", tmp_path / "other")
    assert code == 1 and "hf://somebody/else holds no adapter_config.json; check the address" in err


def test_one_plain_line_for_what_goes_wrong(hub, run, saved, tmp_path, monkeypatch):
    for arguments, said in (
        (("push", saved, "film"), "film is no address of a prefix on a hub; expected hf://OWNER/NAME"),
        (("push", saved, "hf://others/film"), "the hub says 403"),
        (("push", tmp_path / "none", "hf://me/film"), "none"),
        (("inspect", "hf://me/none"), "the hub has no me/none that this token may see"),
        (("inspect", "hf://none"), "expected hf://OWNER/NAME"),
    ):
        code, _, err = run(*arguments)
        assert code == 1 and err.startswith("error: ") and said in err and len(err.splitlines()) == 1, (arguments, err)
    monkeypatch.setenv("HF_TOKEN", hubs.TOKEN + "x")
    code, _, err = run("push", saved, "hf://me/film")
    assert code == 1 and "the hub says 401" in err and "set HF_TOKEN" in err and not hub.commits
