"""The shares that the server tells, against ``fw.attention_shares`` on the same model with the prefix attached."""

from __future__ import annotations

import asyncio
import json
import socket
from itertools import pairwise

import engines
import httpx
import pytest
import torch
from engines import alone
from servers import KEY, serving, wait_for

import foreword as fw
import zoo
from foreword.serve.library import Library
from foreword.serve.measuring import Measurement

TOKENIZER = zoo.tokenizer()
TEXT, ANSWER = "The film is", " a lovely old place"
PATH = "/v1/foreword/shares"


def directly(name, prefix, tokens, strength=1.0, boundary=0):
    """Means over the heads ``(S,)``, by site."""
    model = zoo.build(name)
    fw.attach(model, prefix, strength=strength)
    with fw.boundary(boundary):
        found = fw.attention_shares(model, input_ids=torch.tensor([tokens]))
    return {site: share[0].mean(0) for site, share in found.items()}


def measure(held, task, tokens, strength=1.0, **options):
    made = Measurement(held, task, strength, tokens, **{"output_from": len(tokens), "step_tokens": 4, **options})
    passes = 1
    while not made.go_on():
        passes += 1
    made.close()
    return made.shares, passes


def same(found, want):
    assert list(found) == list(want)
    for site, share in want.items():
        torch.testing.assert_close(found[site], share, atol=1e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "gptoss", "qwen3"])
@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_a_text_read_by_parts_has_the_shares_of_the_whole(name, strength):
    held, tokens = engines.library(name), engines.prompt(11)
    found, passes = measure(held, "long", tokens, strength)
    assert passes == 3
    same(found, directly(name, held["long"], tokens, strength))
    assert 0.01 < torch.stack(list(found.values())).mean() < 0.99


def test_prefixes_that_only_the_output_sees_and_gates():
    model, tokens = zoo.build("llama"), engines.prompt(10)
    for options in ({"visible": "infix"}, {"gate": "head"}, {"gate": "zero"}):
        tuning = fw.attach(model, fw.PrefixConfig(length=3, init="random", **options))
        for parameter in tuning.parameters():
            parameter.data += 0.3
        prefix = tuning.bake()
        tuning.detach()
        held = Library(model)
        held.add("task", prefix)
        found, _ = measure(held, "task", tokens, output_from=6)
        held.detach()
        same(found, directly("llama", prefix, tokens, boundary=6))
        first = next(iter(found.values()))
        assert bool(first.isnan().all()) == (options == {"gate": "zero"})
        assert bool((first[:6] == 0).all()) == (options == {"visible": "infix"})


def test_many_heads_are_read_in_smaller_parts(monkeypatch):
    monkeypatch.setattr("foreword.serve.measuring._MOST_SCORES", 4 * 11 * 2)
    held, tokens = engines.library(), engines.prompt(11)
    found, passes = measure(held, "short", tokens, step_tokens=512)
    assert passes == 6
    same(found, directly("llama", held["short"], tokens))


def test_a_budget_counts_the_text_and_the_task_until_it_is_closed():
    model, prefix, tokens = zoo.build("llama"), engines.library()["long"], engines.prompt(11)
    need = Library.bytes_of(held := Library(model), prefix)
    held.detach()
    for room, fits in ((1100, True), (1099, False)):
        held = Library(model, budget=fw.Budget(device_bytes=need + room, when_full="refuse"))
        held.add("task", prefix)
        before = held.usage
        made = Measurement(held, "task", 1.0, tokens, output_from=11, step_tokens=4, column_bytes=100)
        if fits:
            made.go_on()
            assert held.usage.caches == 1100 and held.usage.tasks["task"].users == 1
        else:
            with pytest.raises(fw.BudgetError, match="1,100"):
                made.go_on()
        held.remove("task")  # it goes on with the task that it has
        if fits:
            assert made.go_on() is False
        made.close()
        made.close()
        assert made.go_on()  # closed: nothing to do
        assert held.usage.caches == 0 and held.usage.tiers["device"].nbytes == 0 < before.tiers["device"].nbytes
        held.detach()


@pytest.fixture(scope="module")
def server():
    with serving(length=60) as running:
        yield running


def post(running, **change):
    body = {"model": "long", "prompt": TEXT, "answer": ANSWER, **change}
    return httpx.post(running.url + PATH, json={k: v for k, v in body.items() if v is not None}, timeout=60)


def test_the_answer_has_means_of_columns(server):
    prompt, answer = (TOKENIZER(t)["input_ids"] for t in (TEXT, ANSWER))
    want = directly("llama", server.held["long"], prompt + answer, 1.5)
    for columns in (1, 4, 64):
        got = post(server, strength=1.5, columns=columns).json()
        length = len(prompt) + len(answer)
        assert (got["prompt_tokens"], got["tokens"], got["virtual_tokens"]) == (len(prompt), length, 6)
        edges = got["edges"]
        assert len(edges) == min(columns, length) + 1 and edges[0] == 0 and edges[-1] == length
        widths = [b - a for a, b in pairwise(edges)]
        assert max(widths) - min(widths) <= 1 <= min(widths)
        assert [layer["site"] for layer in got["layers"]] == list(want)
        for layer in got["layers"]:
            share = want[layer["site"]]
            means = [float(share[a:b].mean()) for a, b in pairwise(edges)]
            assert layer["share"] == pytest.approx(means, abs=1e-5)
            assert layer["mean"] == pytest.approx(float(share.mean()), abs=1e-5)


def test_chats_are_measured_in_the_models_template(server):
    got = post(server, prompt=None, messages=[{"role": "user", "content": "The film"}], answer=None).json()
    tokens = TOKENIZER("user: The film\nassistant:")["input_ids"]
    want = directly("llama", server.held["long"], tokens)
    assert got["tokens"] == got["prompt_tokens"] == len(tokens)
    assert [x["mean"] for x in got["layers"]] == pytest.approx([float(s.mean()) for s in want.values()], abs=1e-5)


@pytest.mark.parametrize("change", [{"model": "base"}, {"strength": 0}], ids=str)
def test_where_there_is_no_prefix_no_layer_is_told(server, change):
    got = post(server, **change)
    assert got.status_code == 200 and got.json()["layers"] == []


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "lang"}, 404, "did you mean long"), ({"prompt": None}, 400, "either a prompt or messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, 400, "either a prompt or messages"),
        ({"prompt": ""}, 400, "no token"), ({"answer": "film " * 60}, 400, "at most 60 fit"),
        ({"columns": 0}, 400, "columns"), ({"columns": 5000}, 400, "columns"), ({"strength": -1}, 400, "strength"),
        ({"answer": "\ud800"}, 400, ""), ({"n": 2}, 400, "not a known parameter"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(server, change, status, message):
    body = json.dumps({k: v for k, v in {"model": "long", "prompt": TEXT, **change}.items() if v is not None})
    got = httpx.post(server.url + PATH, content=body, headers={"content-type": "application/json"})
    assert got.status_code == status and message in got.json()["error"]["message"], got.text


def test_unknown_names_are_no_labels_of_numbers(server):
    post(server, model="never-seen")
    assert "never-seen" not in httpx.get(f"{server.url}/metrics").text


def test_it_needs_a_key():
    with serving(keys=[KEY]) as running:
        assert post(running).status_code == 401


def test_answers_that_are_written_meanwhile_stay_what_they_are(server):
    want = TOKENIZER.decode(alone(server.held, TOKENIZER(TEXT)["input_ids"], "long", 30))
    own = post(server).json()

    async def main():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            asked = {"model": "long", "prompt": TEXT, "max_tokens": 30, "temperature": 0}
            text = [client.post("/v1/completions", json=asked) for _ in range(6)]
            shares = [client.post(PATH, json={"model": "long", "prompt": TEXT, "answer": ANSWER}) for _ in range(12)]
            return await asyncio.gather(*text), await asyncio.gather(*shares)

    texts, shares = asyncio.run(main())
    assert [t.json()["choices"][0]["text"] for t in texts] == [want] * 6
    assert [s.json() for s in shares] == [own] * 12
    assert server.engine.stats.failed == 0


def test_few_wait_late_ones_are_told_and_who_leaves_is_forgotten():
    held = engines.library()
    with serving(held, queue=1, seconds=2.0, step_tokens=1) as running:
        slow = held.model.model.layers[0].register_forward_hook(lambda *_: __import__("time").sleep(0.25))
        turns = running.service.measuring
        body = json.dumps({"model": "long", "prompt": TEXT, "answer": ANSWER}).encode()
        client = socket.create_connection(("127.0.0.1", running.port), timeout=20)
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        wait_for(lambda: turns.waiting == 1)
        full = post(running)
        assert full.status_code == 429 and full.headers["retry-after"] == "1"
        client.close()
        wait_for(lambda: turns.waiting == 0)
        late = post(running)
        assert late.status_code == 504 and "not measured within 2 s" in late.json()["error"]["message"]
        slow.remove()
        assert post(running).status_code == 200 and turns.waiting == 0
    with serving(held := engines.library()) as running:
        running.engine.stop()
        assert post(running).status_code == 503
