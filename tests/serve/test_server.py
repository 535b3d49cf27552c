"""The server with the clients that people have: openai (sync, async, streaming), httpx and curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess

import engines
import httpx
import openai
import pytest
import servers
from engines import alone
from servers import ADMIN, KEY, serving

import zoo

TEXT = "The film is"
TOKENIZER = zoo.tokenizer()


def wanted(held, task, tokens=10, text=TEXT):
    """The text that ``generate`` writes for a prompt alone."""
    return TOKENIZER.decode(alone(held, TOKENIZER(text)["input_ids"], task, tokens), skip_special_tokens=True)


@pytest.fixture(scope="module")
def server():
    with serving(n=4, prompts=3, chat_tokens=20) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def complete(client, task, **options):
    return client.completions.create(**{"model": task, "prompt": TEXT, "max_tokens": 10, "temperature": 0, **options})


def test_completions_are_what_generate_writes(server, client):
    for task in ("long", "short", "base"):
        got = complete(client, task)
        assert got.choices[0].text == wanted(server.held, None if task == "base" else task)
        assert got.choices[0].finish_reason == "length" and got.model == task and got.object == "text_completion"
        prompt = len(TOKENIZER(TEXT)["input_ids"])
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (prompt, 10)
        assert got.usage.total_tokens == prompt + 10


def test_several_prompts_and_answers(server, client):
    ids = TOKENIZER("There is a")["input_ids"]
    got = complete(client, "middle", prompt=["The film", "There is a", "Write"], n=2)
    assert [c.index for c in got.choices] == list(range(6))
    want = [wanted(server.held, "middle", text=t) for t in ("The film", "There is a", "Write") for _ in "ab"]
    assert [c.text for c in got.choices] == want and got.usage.completion_tokens == 60
    assert complete(client, "middle", prompt=ids).choices[0].text == want[2]
    assert [c.text for c in complete(client, "middle", prompt=[ids, ids]).choices] == [want[2]] * 2


def test_streams_are_the_same_text(server, client):
    whole = complete(client, "long", prompt=["The film", "Write"], n=2)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(complete(client, "long", prompt=["The film", "Write"], n=2, **options))
    texts, ends = [""] * 4, [None] * 4
    for part in parts[:-1]:
        (choice,) = part.choices
        assert ends[choice.index] is None and part.usage is None
        texts[choice.index] += choice.text
        ends[choice.index] = choice.finish_reason
    assert texts == [c.text for c in whole.choices] and ends == ["length"] * 4
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert len({p.id for p in parts}) == 1 and len(parts) > 20


def test_chats(server, client):
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "film"}]
    messages = [{"role": "system", "content": "Be good."}, {"role": "user", "content": parts}]
    text = "system: Be good.\nuser: The film\nassistant:"
    common = {"model": "short", "messages": messages, "temperature": 0}
    got = client.chat.completions.create(**common, max_completion_tokens=10)
    assert got.choices[0].message.content == wanted(server.held, "short", text=text)
    assert got.usage.prompt_tokens == len(TOKENIZER(text)["input_ids"])
    assert client.chat.completions.create(**common).usage.completion_tokens == 20  # the server's default
    parts = list(client.chat.completions.create(**common, max_tokens=10, stream=True, n=2))
    assert [p.choices[0].delta.role for p in parts[:2]] == ["assistant"] * 2
    for index in (0, 1):
        own = [p.choices[0] for p in parts if p.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in own) == got.choices[0].message.content
        assert own[-1].finish_reason == "length"


def test_log_probabilities(server, client):
    got = complete(client, "long", logprobs=3).choices[0].logprobs
    assert len(got.tokens) == len(got.token_logprobs) == len(got.top_logprobs) == len(got.text_offset) == 10
    assert all(p <= 0 for p in got.token_logprobs) and all(len(t) <= 3 for t in got.top_logprobs)
    assert got.text_offset == [sum(map(len, got.tokens[:i])) for i in range(10)]
    parts = list(complete(client, "long", logprobs=3, stream=True))
    assert [t for p in parts for t in p.choices[0].logprobs.tokens] == got.tokens
    assert [o for p in parts for o in p.choices[0].logprobs.text_offset] == got.text_offset
    assert complete(client, "long", logprobs=0).choices[0].logprobs.top_logprobs is None
    assert complete(client, "long").choices[0].logprobs is None
    chat = client.chat.completions.create(
        model="long", messages=[{"role": "user", "content": TEXT}], max_tokens=4, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    for token in content:
        assert len(token.top_logprobs) == 2 and token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-5)
        assert bytes(token.bytes).decode() == token.token


def test_sampling_options_reach_the_engine(server, client):
    greedy = complete(client, "long").choices[0].text
    draws = {"temperature": 1.5, "seed": 5}
    assert complete(client, "long", **draws).choices[0].text == complete(client, "long", **draws).choices[0].text
    assert complete(client, "long", **draws).choices[0].text != greedy
    assert complete(client, "long", **draws, extra_body={"top_k": 1}).choices[0].text == greedy
    assert complete(client, "long", **draws, top_p=1e-6).choices[0].text == greedy
    assert complete(client, "long", extra_body={"strength": 0.0}).choices[0].text == wanted(server.held, None)
    first = TOKENIZER(greedy)["input_ids"][0]
    biased = complete(client, "long", logit_bias={str(first): -100})
    assert not biased.choices[0].text.startswith(TOKENIZER.decode([first]))
    stop = greedy[3:6]
    stopped = complete(client, "long", stop=[stop, "never"])
    assert stopped.choices[0].text == greedy[: greedy.index(stop)] and stopped.choices[0].finish_reason == "stop"
    assert len(complete(client, "long", frequency_penalty=2.0, presence_penalty=2.0).choices[0].text) > 0


def test_models(server, client):
    names = [m.id for m in client.models.list()]
    assert names == ["base", "short", "middle", "long"]
    assert client.models.retrieve("long").parent == "base" and client.models.retrieve("base").parent is None
    with pytest.raises(openai.NotFoundError, match="did you mean long"):
        client.models.retrieve("lang")


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": "lang"}, "model", "no model is named 'lang'; did you mean long"),
        ({"prompt": None}, "prompt", "prompt"), ({"prompt": ""}, "prompt", "no token"),
        ({"prompt": []}, "prompt", ""), ({"prompt": [[]]}, "prompt", ""), ({"prompt": ["a"] * 4}, "prompt", "at most"),
        ({"prompt": [3, 9999]}, None, "outside the vocabulary"), ({"prompt": TEXT * 60}, "prompt", "at most 128"),
        ({"prompt": "a \ud800 b"}, "prompt", "surrogate"), ({"n": 5}, "n", "at most 4"), ({"n": 0}, "n", "greater"),
        ({"max_tokens": 0}, "max_tokens", "greater"), ({"max_tokens": "8"}, "max_tokens", "integer"),
        ({"temperature": -1}, "temperature", "greater"), ({"top_p": 0}, "top_p", "greater"),
        ({"echo": True}, "echo", ""), ({"suffix": "x"}, "suffix", ""), ({"best_of": 2}, "best_of", ""),
        ({"temprature": 1}, "temprature", "not a known parameter"), ({"stop": [""]}, None, "at least 1 character"),
        ({"logprobs": 21}, "logprobs", "20"), ({"logit_bias": {"x": 1}}, None, "pattern"),
        ({"strength": -1}, "strength", "greater"), ({"model": "l\ud800"}, "model", "unicode"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(server, change, param, message):
    body = json.dumps({"model": "long", "prompt": "The", "max_tokens": 4, **change})
    got = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert got.status_code == (404 if change.get("model") == "lang" else 400), got.text
    error = got.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert param is None or error["param"].split(".")[0] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"), ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"), ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)  # fmt: skip
def test_chats_that_ask_for_what_there_is_not(server, change, param):
    body = {"model": "long", "messages": [{"role": "user", "content": "x"}], **change}
    got = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert got.status_code == 400 and got.json()["error"]["param"].split(".")[0] == param


def test_templates_that_refuse_and_models_without_one(server):
    tokenizer, body = server.service.tokenizer, {"model": "long", "messages": [{"role": "user", "content": "x"}]}
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        got = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert got.status_code == 400 and "roles must alternate" in got.json()["error"]["message"]
        tokenizer.chat_template = None
        got = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert got.status_code == 400 and got.json()["error"]["code"] == "no_chat_template"
    finally:
        tokenizer.chat_template = template


def test_many_async_clients_get_their_own_task(server):
    """Each answer is what its request gets alone, greedily, whatever runs beside it."""
    tasks, texts = ["long", None, "short", "middle"], ["The film", "There is a place in the city", "Write"]
    want = {(task, text): wanted(server.held, task, 12, text) for task in tasks for text in texts}

    async def one(client, number):
        task, text = tasks[number % 4], texts[number % 3]
        options = {"model": task or "base", "prompt": text, "max_tokens": 12, "temperature": 0}
        if number % 2:
            got = (await client.completions.create(**options)).choices[0].text
        else:
            got = "".join([p.choices[0].text async for p in await client.completions.create(**options, stream=True)])
        return (task, text), got

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(48)))

    for key, got in asyncio.run(main()):
        assert got == want[key]
    assert server.engine.stats.rows <= 8


def test_curl(server):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"model": "long", "prompt": TEXT, "max_tokens": 10, "temperature": 0})
    command = ["curl", "-sS", "-i", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    out = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    head, _, page = out.partition("\n\n" if "\r" not in out else "\r\n\r\n")
    assert "200 OK" in head and "x-request-id" in head
    assert json.loads(page)["choices"][0]["text"] == wanted(server.held, "long")
    streamed = json.dumps({**json.loads(body), "stream": True})
    out = subprocess.run([*command[:-1], streamed, "-N"], capture_output=True, text=True, timeout=30, check=True).stdout
    assert "text/event-stream" in out and out.rstrip().endswith("data: [DONE]")
    chunks = [json.loads(line[6:]) for line in out.splitlines() if line.startswith("data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == wanted(server.held, "long")


def test_health_readiness_metrics_and_unknown_pages(server, client):
    before = complete(client, "long")
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "alive"}
    assert httpx.get(f"{server.url}/readyz").json() == {"status": "ready"}
    page = httpx.get(f"{server.url}/metrics").text
    numbers = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(numbers['foreword_requests_total{model="long",route="completions",status="200"}']) >= 1
    assert float(numbers['foreword_tokens_total{kind="answer",model="long"}']) >= before.usage.completion_tokens
    assert float(numbers["foreword_tasks"]) == 3 and float(numbers["foreword_rows"]) == 0
    assert float(numbers["foreword_prefix_bytes"]) == sum(server.held[n].nbytes for n in server.held.names)
    assert float(numbers['foreword_first_token_seconds_count{route="completions"}']) >= 1
    got = httpx.get(f"{server.url}/v2")
    assert got.status_code == 404 and got.json()["error"]["message"] == "there is no such page"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    named = httpx.get(f"{server.url}/healthz", headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    assert len(httpx.get(f"{server.url}/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"]) == 32


def test_keys():
    with serving(keys=[KEY, "another-key-of-the-tests"], admin=[ADMIN]) as running:

        def status(key=None, path="/v1/models", scheme="Bearer"):
            headers = {"authorization": f"{scheme} {key}"} if key is not None else {}
            return httpx.get(running.url + path, headers=headers).status_code

        assert [status(KEY), status("another-key-of-the-tests"), status(KEY, scheme="bearer")] == [200] * 3
        assert [status(), status("x"), status("x" * 18), status(KEY + "x"), status(KEY, scheme="Basic")] == [401] * 5
        assert status(ADMIN) == 401 and status(KEY, "/admin/prefixes") == 401
        assert status(ADMIN, "/admin/prefixes") == 200
        assert [status(path=p) for p in ("/healthz", "/readyz", "/metrics")] == [200] * 3
        bad = openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong-key-of-the-tests", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            bad.models.list()
        # A body isn't read before its key is known.
        got = httpx.post(f"{running.url}/v1/completions", content=b"{" * 100)
        assert got.status_code == 401
    with serving() as running:
        assert httpx.get(f"{running.url}/admin/prefixes").status_code == 403


def test_a_full_queue_and_late_answers(monkeypatch):
    held = engines.library()
    with serving(held, rows=1, queue=1, seconds=1.0) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        slow = held.model.model.layers[0].register_forward_hook(lambda *_: __import__("time").sleep(0.03))
        with complete(client, "long", max_tokens=100, stream=True) as first:
            next(iter(first))
            with complete(client, "long", max_tokens=100, stream=True) as second:
                servers.wait_for(lambda: running.engine.stats.waiting == 1)
                with pytest.raises(openai.RateLimitError) as refused:
                    complete(client, "long")
                assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
                assert refused.value.code == "queue_full"
                for late in (first, second):  # both run out of time: one while it is written, one in the queue
                    with pytest.raises(openai.APIError, match="no answer within"):
                        list(late)
        servers.wait_for(lambda: running.engine.stats.waiting == 0)  # dropped between steps
        with pytest.raises(openai.APIStatusError, match="no answer within") as late:
            complete(client, "long", max_tokens=100)
        assert late.value.status_code == 504
        slow.remove()
        assert complete(client, "long").choices[0].text == wanted(held, "long")
