"""Parts of the server by themselves: keys, streams that nobody reads, names."""

from __future__ import annotations

import asyncio

import engines
import httpx
import pytest
from servers import serving

import foreword as fw
import zoo
from foreword.cli.serve import _add, _name_of
from foreword.errors import nearest
from foreword.serve.http.errors import ApiError
from foreword.serve.http.keys import Keys, check, read_keys
from foreword.serve.http.streams import ClientGoneError, EventStream
from foreword.serve.library import Library

VARIABLE = "FOREWORD_KEYS_OF_THE_TESTS"


def test_keys_are_read_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst-key-of-the-tests  # of Ann\n  second#key-of-the-tests\nschlüssel-der-tests\n")
    monkeypatch.setenv(VARIABLE, "third-key-of-the-tests, fourth-key-of-the-tests,")
    keys = read_keys(file, VARIABLE)
    assert len(keys) == 5
    for key in ("first-key-of-the-tests", "second#key-of-the-tests", "schlüssel-der-tests", "fourth-key-of-the-tests"):
        check(f"Bearer {key}", keys)
    for given in ("Bearer second", "Bearer ", "", "Bearer # ours", "Bearer third-key-of-the-tests,x", "Bearer \udcff"):
        with pytest.raises(ApiError, match="missing or wrong"):
            check(given, keys)


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_a_secret_that_got_lost_does_not_open_the_door(value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(fw.ConfigError, match=f"{VARIABLE} is set and has no key"):
        read_keys(None, VARIABLE)
    monkeypatch.delenv(VARIABLE)
    assert len(read_keys(None, VARIABLE)) == 0


def test_a_key_beyond_ascii_goes_over_the_wire():
    with serving(keys=["schlüssel-der-tests"]) as running:
        for key, status in (("schlüssel-der-tests", 200), ("schlussel-der-tests", 401)):
            headers = {b"authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == status
    assert not Keys(()).has("")


@pytest.mark.parametrize("how", ["broken", "full", "cancelled"])
def test_a_stream_that_is_never_begun_frees_its_rows(how):
    """A generator that was never asked for anything runs no ``finally``: the stream itself has to say that it ends."""
    ended, begun = [], []

    async def events():
        begun.append(True)
        yield b"data: x\n\n"

    async def receive():
        await asyncio.sleep(3600)

    async def send(message):
        if how == "broken":
            raise OSError("the connection broke")
        await asyncio.sleep(3600)

    async def main():
        stream = EventStream(events(), done=lambda: ended.append(True), write_seconds=0.05)
        running = asyncio.ensure_future(stream({"type": "http"}, receive, send))
        await asyncio.sleep(0.01)
        if how == "cancelled":
            running.cancel()
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else ClientGoneError):
            await running

    asyncio.run(main())
    assert ended == [True] and begun == []


def test_names_that_are_not_there():
    held = engines.library()
    for number in range(30):
        held.add(f"task{number}", held["short"])
    with serving(held) as running:
        for name, said in (
            ("task3x", "did you mean task3"),
            ("zzz", "there are: base, short, middle, long, task0, task1"),
        ):
            message = httpx.get(f"{running.url}/v1/models/{name}").json()["error"]["message"]
            assert message.startswith(f"no model is named '{name}'; {said}")
        assert message.endswith("task15 and 14 more")
        long = httpx.get(f"{running.url}/v1/models/{'x' * 5000}").json()["error"]["message"]
        assert len(long) < 600
    assert nearest("zzz", ["a", "b"]) == "there are: a, b" and nearest("zzz", []) == "there are: none"


def test_the_base_models_name(tmp_path):
    for name in ("Model-1.7B", "weights.gguf"):
        (tmp_path / name).touch() if name.endswith(".gguf") else (tmp_path / name).mkdir()
    assert _name_of(str(tmp_path / "Model-1.7B")) == _name_of(str(tmp_path / "Model-1.7B") + "/") == "Model-1.7B"
    assert _name_of(str(tmp_path / "weights.gguf")) == "weights"
    assert _name_of("hub/Model-1.7B") == "hub/Model-1.7B" and _name_of("demo") == "demo"


def test_what_only_lies_in_the_folder_may_be_anothers():
    model, other = zoo.build("llama"), zoo.build("gpt2")
    own = engines.prefixes(model)
    foreign = fw.Prefix.from_tensors(other, zoo.random_prefix(other, fw.sites(other)))
    ranks = dict.fromkeys(("short", "long", "foreign", "mine"), (0, False))
    held, lying = Library(model), {"foreign": foreign, "long": own["long"]}
    _add(held, {"short": own["short"]}, lying, ranks, force=False)
    assert held.names == ["short", "long"] and list(lying) == ["long"]
    with pytest.raises(fw.MismatchError, match="--prefix mine: "):
        _add(held, {"mine": foreign}, {}, ranks, force=False)
