"""What happens to a server: clients that leave or don't read, garbage, tasks changed under load, its end under load."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from contextlib import suppress

import engines
import httpx
import openai
import pytest
import servers
from engines import alone
from servers import ADMIN, KEY, Process, serving, wait_for

import foreword as fw
import zoo
from foreword.serve.shelf import Shelf

TOKENIZER = zoo.tokenizer()
TEXT = "The film is"
IDS = TOKENIZER(TEXT)["input_ids"]
ADMINISTRATOR = {"authorization": f"Bearer {ADMIN}"}


def text_of(held, task, tokens=10):
    return TOKENIZER.decode(alone(held, IDS, task, tokens), skip_special_tokens=True)


def post(running, **options):
    body = {"model": "long", "prompt": TEXT, "max_tokens": 10, "temperature": 0, **options}
    return httpx.post(f"{running.url}/v1/completions", json=body, timeout=60)


def slowly(held, seconds=0.01):
    """Have the model take its time."""
    return held.model.model.layers[0].register_forward_hook(lambda *_: time.sleep(seconds))


def idle(running):
    stats = running.engine.stats
    return stats.rows == stats.waiting == stats.reading == 0


def open_socket(running, body, **headers):
    """A request by hand; the answer is for whoever reads."""
    data = json.dumps(body).encode()
    lines = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
    client = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    head = "".join(f"{k}: {v}\r\n" for k, v in lines.items())
    client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + data)
    return client


# ---------------------------------------------------------------- clients


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_free_their_rows(stream):
    held = engines.library()
    want = text_of(held, "short")
    with serving(held, rows=4, queue=8) as running:
        hook = slowly(held)
        body = {"model": "long", "prompt": TEXT, "max_tokens": 100, "stream": stream, "n": 2}
        clients = [open_socket(running, body) for _ in range(4)]  # two are written, two wait
        wait_for(lambda: running.engine.stats.rows == 4 and running.engine.stats.waiting == 2)
        if stream:
            assert b"data: " in clients[0].recv(65536)
        for client in clients:
            client.close()
        wait_for(lambda: idle(running))
        hook.remove()
        assert running.engine.stats.cancelled == 4
        assert post(running, model="short").json()["choices"][0]["text"] == want
        page = httpx.get(f"{running.url}/metrics").text
        assert 'status="499"} 4.0' in page or 'status="200"} 4.0' in page


def test_readers_that_do_not_read_hold_nobody_up():
    held = engines.library()
    want = text_of(held, "long")
    with serving(held, write_seconds=0.5, drain=2, send_buffer=8192) as running:
        # Log-probabilities make answers large: more than the connection holds.
        body = {"model": "long", "prompt": [TEXT] * 8, "max_tokens": 110, "stream": True, "logprobs": 20, "n": 1}
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", running.port))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        wait_for(lambda: running.engine.stats.rows > 0)
        for _ in range(3):
            assert post(running).json()["choices"][0]["text"] == want
        wait_for(lambda: idle(running))
        count = 'foreword_requests_total{model="long",route="completions",status="499"} 1.0'
        wait_for(lambda: count in httpx.get(f"{running.url}/metrics").text)
        client.close()


def test_a_slow_body_ends():
    with serving(body_seconds=0.5) as running:
        client = socket.create_connection(("127.0.0.1", running.port), timeout=10)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in client.recv(65536)
        client.close()


def test_bodies_that_are_too_large():
    with serving(body_bytes=2000) as running:
        assert post(running, prompt="a" * 3000).status_code == 413

        def parts():
            for _ in range(100):
                yield b"a" * 1000

        got = httpx.post(f"{running.url}/v1/completions", content=parts())  # chunked: no length is told
        assert got.status_code == 413 and got.json()["error"]["code"] == "body_too_large"
        assert post(running).status_code == 200


def test_garbage():
    held = engines.library()
    with serving(held) as running:
        bodies = [
            b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe\x00", b"\x00" * 1000, b"[" * 100_000, b'{"a":' * 50_000,
            b'{"model": "long", "prompt": NaN}', b'{"model": "long", "prompt": "a", "temperature": Infinity}',
            b'{"model": "long", "prompt": "a", "max_tokens": 1e400}', b'{"model": "long", "prompt": "a", "seed": 1e30}',
            b'{"model": "long", "prompt": "a", "n": ' + b"9" * 5000 + b"}", b'{"model": {"$ref": "#"}, "prompt": "a"}',
            b'{"model": "long", "prompt": "\\ud800"}', b'{"model": "\\u0000", "prompt": "a"}',
            b'{"model": "long", "prompt": "a", "logit_bias": {"1": 1e999}}', b"<xml/>", b"a=b&c=d",
        ]  # fmt: skip
        with httpx.Client(base_url=running.url, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            for path in ("/v1/completions", "/v1/chat/completions"):
                for body in bodies:
                    for kind in ("application/json", "text/plain", "multipart/form-data; boundary=x"):
                        got = client.post(path, content=body, headers={"content-type": kind})
                        assert 400 <= got.status_code < 500, (path, body[:40], kind, got.text[:300])
                        assert set(got.json()["error"]) == {"message", "type", "param", "code"}
        for raw in (b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"A" * 200_000):
            with socket.create_connection(("127.0.0.1", running.port), timeout=5) as client:
                client.sendall(raw)
                client.shutdown(socket.SHUT_WR)
                with suppress(ConnectionError):
                    while client.recv(65536):
                        pass
        assert post(running).json()["choices"][0]["text"] == text_of(held, "long")
        assert running.engine.stats.failed == 0


def test_a_model_that_fails_is_a_500_and_the_next_request_is_fine():
    held = engines.library()
    want = text_of(held, "long")
    with serving(held) as running:

        def fail(module, args):
            raise RuntimeError("a secret of the model")

        hook = held.model.model.layers[1].register_forward_pre_hook(fail)
        got = post(running)
        assert got.status_code == 500 and "secret" not in got.text
        with httpx.stream("POST", f"{running.url}/v1/completions", json={
            "model": "long", "prompt": TEXT, "stream": True}) as streamed:  # fmt: skip
            lines = [line for line in streamed.iter_lines() if line]
        assert len(lines) == 1 and "error" in json.loads(lines[0][6:]) and "secret" not in lines[0]
        hook.remove()
        assert post(running).json()["choices"][0]["text"] == want


# ---------------------------------------------------------------- tasks changed at run time


@pytest.fixture
def shelf(tmp_path):
    made = engines.prefixes(zoo.build("llama"))
    for name in ("short", "middle", "long"):
        made[name].save(tmp_path / "shelf" / name)
    made["long"].save(tmp_path / "outside")
    return Shelf(tmp_path / "shelf")


def test_tasks_are_loaded_replaced_and_unloaded(shelf):
    held = engines.library()
    want = {t: text_of(held, t) for t in ("short", "middle", "long", None)}
    held.remove("middle")
    with serving(held, shelf=shelf, admin=[ADMIN], tasks=3) as running:
        admin = httpx.Client(base_url=f"{running.url}/admin", headers=ADMINISTRATOR)

        def text(task):
            return post(running, model=task).json()["choices"][0]["text"]

        assert post(running, model="middle").status_code == 404
        got = admin.put("/prefixes/middle", json={})
        assert got.status_code == 201 and got.json()["virtual_tokens"] == 3 and got.json()["folder"] == "middle"
        assert text("middle") == want["middle"]
        got = admin.put("/prefixes/middle", json={"folder": "long"})
        assert got.status_code == 200 and text("middle") == want["long"]
        listed = admin.get("/prefixes").json()
        assert [t["name"] for t in listed["tasks"]] == ["short", "long", "middle"]
        assert listed["available"] == ["long", "middle", "short"]
        got = admin.put("/prefixes/fourth", json={"folder": "long"})
        assert got.status_code == 400 and "3 tasks are served, which is the most" in got.text
        assert admin.delete("/prefixes/middle").json()["name"] == "middle"
        assert post(running, model="middle").status_code == 404 and admin.delete("/prefixes/middle").status_code == 404
        assert [m["id"] for m in httpx.get(f"{running.url}/v1/models").json()["data"]] == ["base", "short", "long"]
        assert admin.put("/prefixes/base", json={"folder": "long"}).status_code == 400
        assert admin.delete("/prefixes/base").status_code == 400
        assert text("short") == want["short"] and text("base") == want[None]


def test_nothing_from_outside_is_loaded_and_nothing_bad_harms(shelf, tmp_path):
    held = engines.library()
    (shelf.folder / "link").symlink_to(tmp_path / "outside")
    (shelf.folder / "broken").mkdir()
    (shelf.folder / "broken" / "foreword.json").write_text("[" * 100_000)
    (shelf.folder / "broken" / "prefix.safetensors").write_bytes(b"\xff" * 64)
    gpt2 = zoo.build("gpt2")
    fw.Prefix.from_tensors(gpt2, zoo.random_prefix(gpt2, fw.sites(gpt2))).save(shelf.folder / "foreign")
    with serving(held, shelf=shelf, admin=[ADMIN]) as running:
        admin = httpx.Client(base_url=f"{running.url}/admin", headers=ADMINISTRATOR)
        for folder in ("..", "../outside", str(tmp_path / "outside"), "link", "", "a/b", "long/../../outside", "\0"):
            got = admin.put("/prefixes/new", json={"folder": folder})
            assert got.status_code == 400, (folder, got.text)
            assert str(tmp_path) not in got.json()["error"]["message"] or folder.startswith("/")
        for folder in ("broken", "foreign"):
            got = admin.put("/prefixes/long", json={"folder": folder})  # what is served stays
            assert got.status_code == 400 and got.json()["error"]["code"] == "bad_prefix", got.text
        assert admin.put("/prefixes/new", json={"folder": "nowhere"}).status_code == 404
        for name in ("..%2f..", "%2e%2e", "a%2fb", ".hidden", "x" * 200):
            assert admin.put(f"/prefixes/{name}", json={"folder": "long"}).status_code in (400, 404, 405), name
        assert "new" not in held and post(running).json()["choices"][0]["text"] == text_of(held, "long")
    with serving(held_again := engines.library(), admin=[ADMIN]) as running:
        got = httpx.put(f"{running.url}/admin/prefixes/new", json={"folder": "long"}, headers=ADMINISTRATOR)
        assert got.status_code == 403 and "new" not in held_again


def test_a_task_replaced_under_load_is_the_old_one_or_the_new_one(shelf):
    """Never a mixture, and whoever was taken before the change gets the old one."""
    held = engines.library()
    old, new, other = text_of(held, "long", 24), text_of(held, "middle", 24), text_of(held, "short", 24)
    assert len({old, new, other}) == 3
    with serving(held, shelf=shelf, admin=[ADMIN], rows=6, queue=100) as running:

        async def main():
            limits = httpx.Limits(max_connections=60)
            async with httpx.AsyncClient(base_url=running.url, timeout=60, limits=limits) as client:

                async def ask(task, begun):
                    body = {"model": task, "prompt": TEXT, "max_tokens": 24, "temperature": 0}
                    got = await client.post("/v1/completions", json=body)
                    return begun, got.json()["choices"][0]["text"]

                state = {"now": "old"}
                found, tasks = [], set()
                for number in range(60):
                    tasks.add(asyncio.ensure_future(ask("long" if number % 3 else "short", state["now"])))
                    if number in (15, 30, 45):
                        await asyncio.sleep(0.05)
                        folder = "middle" if state["now"] == "old" else "long"
                        state["now"] = "changing"
                        put = client.put("/admin/prefixes/long", json={"folder": folder}, headers=ADMINISTRATOR)
                        assert (await put).status_code == 200
                        state["now"] = "new" if folder == "middle" else "old"
                    await asyncio.sleep(0.004)
                found = await asyncio.gather(*tasks)
                return found, state["now"], await ask("long", "last")

        found, state, (_, last) = asyncio.run(main())
    assert {t for _, t in found} == {old, new, other}
    assert last == (new if state == "new" else old)


# ---------------------------------------------------------------- the end


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model and its prefixes on disk."""
    path = tmp_path_factory.mktemp("served")
    model = zoo.build("llama")
    model.save_pretrained(path / "model")
    servers.tokenizer().save_pretrained(path / "model")
    for name, prefix in engines.prefixes(model).items():
        prefix.save(path / "prefixes" / name)
    return path


def test_the_command_serves_and_drains_on_sigterm(folders):
    model, _ = fw.load_model(folders / "model")
    model.generation_config.eos_token_id = None
    held = engines.library()
    options = ["--model", folders / "model", "--prefix-dir", folders / "prefixes", "--name", "base", "--rows", "4"]
    secret = "The film is a place"
    with Process(*options, environment={"FOREWORD_API_KEYS": KEY}) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
        assert [m.id for m in client.models.list()] == ["base", "long", "middle", "short"]
        assert "text/html" in httpx.get(running.url).headers["content-type"]
        got = client.completions.create(model="long", prompt=secret, max_tokens=8, temperature=0)
        assert got.choices[0].text == TOKENIZER.decode(
            alone(held, TOKENIZER(secret)["input_ids"], "long", 8), skip_special_tokens=True
        )
        streams, texts = [], {}
        for number, task in enumerate(("long", "short", "base", "middle") * 2):  # four are written, four wait
            streams.append((number, task, client.completions.create(
                model=task, prompt=secret, max_tokens=100, temperature=0, stream=True, extra_body={"ignore_eos": True}
            )))  # fmt: skip
        threads = [
            threading.Thread(target=lambda n=n, t=t, s=s: texts.__setitem__(n, (t, [p.choices[0] for p in s])))
            for n, t, s in streams
        ]
        for thread in threads:
            thread.start()
        code = running.end(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    assert code == 0, "".join(running.lines[-20:])
    assert len(texts) == 8
    for task, parts in texts.values():  # everybody's answer was written to its end
        want = alone(held, TOKENIZER(secret)["input_ids"], None if task == "base" else task, 100)
        assert "".join(p.text for p in parts) == TOKENIZER.decode(want, skip_special_tokens=True)
        assert parts[-1].finish_reason == "length"
    log = running.log()
    assert [e["event"] for e in log if e["event"] != "request"] == ["ready", "stopping", "stopped"]
    done = [e for e in log if e["event"] == "request" and e["path"] == "/v1/completions"]
    assert len(done) == 9 and done[0]["completion_tokens"] == 8 and done[0]["model"] == "long"
    assert all({"time", "level", "id", "status", "milliseconds"} <= e.keys() for e in done)
    assert not any("film" in line for line in running.lines)  # no prompt in the log


def test_the_command_says_what_is_wrong_before_it_loads_anything(folders, tmp_path):
    from typer.testing import CliRunner

    from foreword.cli import app

    def refused(*options):
        got = CliRunner().invoke(app, ["serve", "--model", "nowhere", *map(str, options)])
        assert got.exit_code != 0
        return str(got.exception)

    assert "not of the form KEY=VALUE" in refused("--prefix", "x")
    assert "can't be a task's" in refused("--prefix", "a/b=x")
    assert "is not a folder" in refused("--prefix", f"a={tmp_path / 'x'}")
    assert "is not a folder" in refused("--prefix-dir", tmp_path / "x")
    assert "can't be read" in refused("--api-keys", tmp_path / "x")
    (tmp_path / "keys").write_text("short\n")
    assert "fewer than 16 characters" in refused("--admin-keys", tmp_path / "keys")
    (tmp_path / "keys").write_text("# none\n")
    assert "has no key" in refused("--api-keys", tmp_path / "keys")
    assert "is the base model's name" in refused("--name", "long", "--prefix", f"long={folders / 'prefixes' / 'long'}")
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    assert "can't listen on 127.0.0.1" in refused("--port", taken.getsockname()[1])
    taken.close()


def test_prompts_are_logged_when_that_is_asked_for_and_bad_prefixes_are_left_out(folders, tmp_path):
    (tmp_path / "prefixes" / "bad").mkdir(parents=True)
    for part in ("foreword.json", "prefix.safetensors"):
        (tmp_path / "prefixes" / "bad" / part).write_text("{")
    gpt2 = zoo.build("gpt2")
    fw.Prefix.from_tensors(gpt2, zoo.random_prefix(gpt2, fw.sites(gpt2))).save(tmp_path / "prefixes" / "foreign")
    prefix = f"good={folders / 'prefixes' / 'long'}"
    options = ["--model", folders / "model", "--prefix", prefix, "--prefix-dir", tmp_path / "prefixes", "--log-prompts"]
    with Process(*options, "--no-playground") as running:
        assert httpx.get(running.url).status_code == 404
        models = [m["id"] for m in httpx.get(f"{running.url}/v1/models").json()["data"]]
        assert models == ["model", "good"]
        body = {"model": "good", "prompt": "The film", "max_tokens": 2}
        assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 200
        code = running.end(signal.SIGINT)
    assert code == 130
    log = running.log()
    assert [e["task"] for e in log if e["event"] == "prefix left out"] == ["bad", "foreign"]
    assert next(e for e in log if e.get("path") == "/v1/completions")["prompt"] == "The film"


def test_a_drain_that_takes_too_long_is_cut_short(folders):
    options = ["--model", folders / "model", "--prefix-dir", folders / "prefixes", "--drain", "1"]
    with Process(*options, "--idle-timeout", "1000") as running:
        port = int(running.url.rsplit(":", 1)[1])
        client = socket.create_connection(("127.0.0.1", port), timeout=60)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.3)  # its body would be waited for
        assert running.end(signal.SIGTERM) == 0
        client.close()
