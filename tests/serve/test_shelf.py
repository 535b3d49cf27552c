"""Prefixes by name from one folder, and nothing from outside it or by any trick in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import engines
import pytest
from hypothesis import given
from hypothesis import strategies as st

import foreword as fw
import zoo
from foreword.serve.shelf import Shelf, check_name


@pytest.fixture(scope="module")
def made():
    return engines.prefixes(zoo.build("llama"))


@pytest.fixture
def shelf(tmp_path, made):
    for name in ("short", "long"):
        made[name].save(tmp_path / "shelf" / name)
    made["middle"].save(tmp_path / "outside")
    return Shelf(tmp_path / "shelf")


def test_prefixes_by_name(shelf, made):
    assert shelf.names() == ["long", "short"] and shelf.load("long") == made["long"]
    (shelf.folder / "again").symlink_to(shelf.folder / "long")  # within the folder a link is fine
    assert shelf.load("again") == made["long"]
    with pytest.raises(fw.PrefixFileError, match="there is no prefix 'middle'"):
        shelf.load("middle")
    with pytest.raises(fw.ConfigError, match="is not a folder"):
        Shelf(shelf.folder / "nowhere")


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "../outside", "long/../../outside", "/etc", "/tmp", "long/", "./long", "a/b", "a\\b", "~", "long\0",
     "lo\nng", "%2e%2e", "-long", ".long", "é", "x" * 129, "long\u2215x", "C:long"],
)  # fmt: skip
def test_names_that_could_lead_elsewhere(shelf, name):
    with pytest.raises(fw.ConfigError, match="can't be a task's"):
        shelf.load(name)


@given(st.text(max_size=20))
def test_a_name_that_passes_is_one_plain_word(name):
    try:
        check_name(name)
    except fw.ConfigError:
        return
    assert Path(name).name == name and name not in (".", "..") and name.isascii() and name.isprintable()


def test_links_that_lead_elsewhere(shelf, tmp_path, made):
    (shelf.folder / "link").symlink_to(tmp_path / "outside")
    (shelf.folder / "up").symlink_to("..")
    (shelf.folder / "self").symlink_to(".")
    for name in ("link", "up", "self"):
        with pytest.raises(fw.ConfigError, match="leads out of the folder"):
            shelf.load(name)
    made["short"].save(shelf.folder / "file")
    (shelf.folder / "file" / "prefix.safetensors").unlink()
    (shelf.folder / "file" / "prefix.safetensors").symlink_to(tmp_path / "outside" / "prefix.safetensors")
    with pytest.raises(fw.ConfigError, match="leads out of its folder"):
        shelf.load("file")
    assert shelf.names() == ["long", "short"]


def test_what_is_damaged_is_an_error_and_nothing_else(shelf, made):
    folder = shelf.folder / "bad"

    def bad(match, **options):
        for part in ("prefix.safetensors", "foreword.json"):
            assert (folder / part).exists()
        with pytest.raises(fw.PrefixFileError, match=match) as refused:
            Shelf(shelf.folder, **options).load("bad")
        assert str(shelf.folder) not in str(refused.value)  # nothing of this machine is told

    made["long"].save(folder)
    description, weights = (folder / "foreword.json").read_text(), (folder / "prefix.safetensors").read_bytes()
    for text in ("", "{", "[]", "null", "7", "[" * 200_000):
        (folder / "foreword.json").write_text(text)
        bad("JSON|format|can't be read")
    parsed = json.loads(description)
    for change in ({"sites": 7}, {"sites": [{}]}, {"rotations": None}, {"fingerprint": {"x": 1}}, {"recall": 3},
                   {"position_offset": "x"}, {"sites": [{**parsed["sites"][0], "kv_heads": 10**12}]}):  # fmt: skip
        (folder / "foreword.json").write_text(json.dumps({**parsed, **change}))
        bad("don't fit together|missing")
    (folder / "foreword.json").write_text(description)
    for data in (b"", b"\xff" * 100, weights[:-10], weights[:8], b"\xff\xff\xff\xff\xff\xff\xff\x7f" + weights[8:]):
        (folder / "prefix.safetensors").write_bytes(data)
        bad("can't be read as safetensors")
    (folder / "prefix.safetensors").write_bytes(weights)
    bad("bytes; at most", most_bytes=100)
    assert shelf.load("bad") == made["long"]


def test_pipes_are_not_waited_for(shelf):
    folder = shelf.folder / "pipe"
    folder.mkdir()
    os.mkfifo(folder / "foreword.json")
    os.mkfifo(folder / "prefix.safetensors")
    with pytest.raises(fw.PrefixFileError, match="no file"):
        shelf.load("pipe")
