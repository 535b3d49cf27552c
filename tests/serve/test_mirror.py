"""A folder that follows a store: in memory, on a disk, with servers reading and processes dying."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engines
import fsspec
import pytest
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword._locked import locked
from foreword.cli import app
from foreword.serve.mirror import Change, Mirror
from foreword.serve.vllm.tasks import Tasks

MADE = engines.prefixes(zoo.build("llama"))


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    """An address, and how to put a prefix there and take one away."""
    if request.param == "disk":
        root = tmp_path / "store"
        root.mkdir()
        yield Store(str(root), fsspec.filesystem("file"), tmp_path)
    else:
        files = fsspec.filesystem("memory")
        files.makedirs("/bucket/prefixes", exist_ok=True)
        yield Store("memory://bucket/prefixes", files, tmp_path)
        files.store.clear()
        files.pseudo_dirs[:] = [""]


class Store:
    def __init__(self, address, files, tmp_path):
        self.address, self.files, self._tmp = address, files, tmp_path
        self.root = address.removeprefix("memory:/")

    def put(self, name, prefix, *, only=("prefix.safetensors", "foreword.json")):
        saved = MADE[prefix].save(self._tmp / "saved", overwrite=True)
        for part in only:
            self.write(f"{name}/{part}", (saved / part).read_bytes())

    def write(self, path, data):
        self.files.makedirs(f"{self.root}/{Path(path).parent}", exist_ok=True)
        self.files.pipe_file(f"{self.root}/{path}", data)

    def remove(self, name):
        self.files.rm(f"{self.root}/{name}", recursive=True)


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".") and p.is_dir()]


def test_what_is_new_changed_and_gone(store, tmp_path):
    folder = tmp_path / "here"
    store.put("a", "short")
    store.put("b", "long")
    mirror = Mirror(store.address, folder)
    assert mirror.once() == [Change("a", "new"), Change("b", "new")]
    assert fw.Prefix.load(folder / "a") == MADE["short"] and fw.Prefix.load(folder / "b") == MADE["long"]
    assert mirror.once() == []
    assert Mirror(store.address, folder).once() == []  # another process finds what is known
    MADE["middle"].save(folder / "own")  # somebody else's
    store.put("a", "middle")
    store.remove("b")
    assert mirror.once() == [Change("a", "replaced"), Change("b", "removed")]
    assert fw.Prefix.load(folder / "a") == MADE["middle"] and not (folder / "b").exists()
    assert fw.Prefix.load(folder / "own") == MADE["middle"] and not hidden(folder)
    shutil.rmtree(folder / "a")
    assert mirror.once() == [Change("a", "new")]


def test_what_is_no_whole_prefix_stays_outside(store, tmp_path):
    folder = tmp_path / "here"
    store.put("a", "short")
    store.put("half", "long", only=["foreword.json"])
    store.write("notes.txt", b"not a prefix")
    mirror = Mirror(store.address, folder)
    assert mirror.once() == [Change("a", "new")]
    store.put("half", "long")
    store.write("a/prefix.safetensors", b"\xff" * 100)
    got = {c.name: c for c in mirror.once()}
    assert got["half"].what == "new" and got["a"].what == "refused" and str(folder) not in got["a"].message
    assert fw.Prefix.load(folder / "a") == MADE["short"]
    fetched, whole = [], mirror._files.get_file
    mirror._files.get_file = lambda *args, **kwargs: (fetched.append(args[0]), whole(*args, **kwargs))
    try:
        assert mirror.once() == [got["a"]] and not fetched  # it is told again, and not fetched again
        store.put("a", "middle")
        assert mirror.once() == [Change("a", "replaced")] and fetched
    finally:
        mirror._files.get_file = whole
    assert fw.Prefix.load(folder / "a") == MADE["middle"]


def test_names_that_no_server_takes_and_others_prefixes(store, tmp_path):
    folder = tmp_path / "here"
    MADE["short"].save(folder / "mine")
    for name in ("mine", "has blank", ".hidden"):
        store.put(name, "long")
    got = {c.name: c for c in Mirror(store.address, folder).once()}
    assert {c.what for c in got.values()} == {"refused"} and len(got) == 3
    assert "didn't bring it" in got["mine"].message and "can't be a task's" in got["has blank"].message
    assert fw.Prefix.load(folder / "mine") == MADE["short"]


def test_too_large_and_no_room(store, tmp_path, monkeypatch):
    store.put("a", "long")
    got = Mirror(store.address, tmp_path / "here", most_bytes=500).once()
    assert got[0].what == "refused" and "at most 500 are fetched" in got[0].message
    mirror = Mirror(store.address, tmp_path / "here")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mirror._files, "get_file", full)
    assert "No space left" in mirror.once()[0].message
    monkeypatch.undo()
    assert mirror.once() == [Change("a", "new")] and not hidden(tmp_path / "here")


def test_an_empty_or_missing_source_removes_nothing(store, tmp_path):
    folder = tmp_path / "here"
    store.put("a", "short")
    mirror = Mirror(store.address, folder)
    mirror.once()
    store.remove("a")
    assert mirror.once() == [] and fw.Prefix.load(folder / "a") == MADE["short"]
    with pytest.raises(fw.StoreError, match="is not there"):
        Mirror(store.address + "/nowhere", tmp_path / "other").once()


def test_removed_ones_are_kept_if_asked_for(store, tmp_path):
    store.put("a", "short")
    store.put("b", "short")
    mirror = Mirror(store.address, tmp_path / "here", remove=False)
    mirror.once()
    store.remove("b")
    assert mirror.once() == [] and (tmp_path / "here" / "b").is_dir()


def test_a_prefix_that_changes_while_it_is_fetched(store, tmp_path):
    store.put("a", "short")
    mirror = Mirror(store.address, tmp_path / "here")
    whole = mirror._files.get_file

    def fetched(remote, local, **kwargs):
        whole(remote, local, **kwargs)
        if remote.endswith("prefix.safetensors"):
            store.put("a", "middle")

    mirror._files.get_file = fetched
    try:
        assert "changed while" in mirror.once()[0].message and not (tmp_path / "here" / "a").exists()
    finally:
        mirror._files.get_file = whole
    assert mirror.once() == [Change("a", "new")] and fw.Prefix.load(tmp_path / "here" / "a") == MADE["middle"]


def test_readers_see_the_old_one_or_the_new_one(store, tmp_path):
    folder, store_names = tmp_path / "here", ["short", "middle", "long"]
    store.put("a", "short")
    mirror = Mirror(store.address, folder)
    mirror.once()
    found, done = [], threading.Event()

    def read():
        while not done.is_set():
            got = fw.Prefix.load(folder / "a")
            found.append(next((n for n in store_names if got == MADE[n]), None))

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            for number in range(1, 30):
                store.put("a", store_names[number % 3])
                assert mirror.once() == [Change("a", "replaced")]
        finally:
            done.set()
        reader.result()  # what it raised
    assert None not in found and len(found) > 10, (len(found), set(found))


def test_vllm_takes_a_replaced_prefix_without_a_restart(store, tmp_path):
    store.put("a", "short")
    mirror = Mirror(store.address, tmp_path / "here")
    mirror.once()
    tasks = Tasks(tmp_path / "here", placeholder=0)
    before = tasks.get("a")
    store.put("a", "long")
    assert tasks.get("a") is before
    mirror.once()
    assert tasks.get("a").salt.digest != before.salt.digest and tasks.get("a").length == MADE["long"].longest


def test_one_mirror_a_folder_and_one_source(store, tmp_path):
    folder = tmp_path / "here"
    store.put("a", "short")
    mirror = Mirror(store.address, folder)
    mirror.once()
    with (
        locked(folder / ".mirror.lock", "taken"),
        pytest.raises(fw.ConfigError, match="another mirror is at work"),
    ):
        mirror.once()
    with pytest.raises(fw.ConfigError, match="follows"):
        Mirror(str(tmp_path), folder)
    (folder / ".mirror.json").write_text("[")
    with pytest.raises(fw.ConfigError, match="can't be read"):
        Mirror(store.address, folder)


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [("nothing://x", fw.ConfigError, "no address"), ("s3://bucket/x", fw.MissingPartError, "s3fs")],
)
def test_addresses_that_nobody_reads(address, error, message, tmp_path):
    if address.startswith("s3"):
        try:
            import s3fs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("s3fs is installed")
    with pytest.raises(error, match=message):
        Mirror(address, tmp_path / "here")


KILLED = """
import sys, time
from foreword.serve import mirror
take = mirror.move
def slowly(*arguments):
    print("moving", flush=True); time.sleep(0.02); take(*arguments); time.sleep(0.02)
mirror.move = slowly
mirror.Mirror(sys.argv[1], sys.argv[2]).once()
"""


@pytest.mark.parametrize("wait", [0.0, 0.03])
def test_a_mirror_that_is_killed_goes_on(wait, tmp_path):
    source, folder = tmp_path / "store", tmp_path / "here"
    MADE["short"].save(source / "a")
    Mirror(str(source), folder).once()
    MADE["long"].save(source / "a", overwrite=True)
    MADE["middle"].save(source / "b")
    process = subprocess.Popen([sys.executable, "-c", KILLED, source, folder], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"moving\n"
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert fw.Prefix.load(folder / "a") in (MADE["short"], MADE["long"])
    Mirror(str(source), folder).once()
    assert fw.Prefix.load(folder / "a") == MADE["long"] and fw.Prefix.load(folder / "b") == MADE["middle"]
    assert not hidden(folder) and Mirror(str(source), folder).once() == []


def test_the_command(tmp_path):
    source, folder = tmp_path / "store", tmp_path / "here"
    MADE["short"].save(source / "a")
    run = CliRunner().invoke
    got = run(app, ["mirror", str(source), str(folder), "--json"])
    assert got.exit_code == 0 and json.loads(got.stdout)["what"] == "new"
    (source / "a" / "foreword.json").write_text("{")
    got = run(app, ["mirror", str(source), str(folder)])
    assert got.exit_code == 1 and "refused a: " in got.stdout
    got = run(app, ["mirror", str(source), str(folder), "--every", "soon"])
    assert isinstance(got.exception, fw.ConfigError) and "expected one like 30s" in str(got.exception)


def test_the_command_goes_on_until_ctrl_c(tmp_path):
    source, folder = tmp_path / "store", tmp_path / "here"
    MADE["short"].save(source / "a")
    command = [sys.executable, "-m", "foreword", "mirror", source, folder, "--every", "0.1s"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(c) for c in command], env=environment, **pipes) as process:
        assert process.stdout.readline() == "new a\n"
        source.rename(tmp_path / "away")  # the store can't be reached for a while
        assert "is not there" in process.stderr.readline()
        (tmp_path / "away").rename(source)
        MADE["middle"].save(source / "b")
        assert process.stdout.readline() == "new b\n"
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(60) == 130 and "Traceback" not in err
    assert fw.Prefix.load(folder / "b") == MADE["middle"]
