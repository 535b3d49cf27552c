"""`foreword serve --engine vllm` as people run it: the real server, asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import small_models as small
import torch

import foreword as fw
import zoo

TOKENS, KEY = 12, "a-key-of-the-tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = small.build("llama"), zoo.tokenizer()
    prefixes = {"a": small.prefix(model, 20, 1), "b": small.prefix(model, 70, 2)}
    for name, made in prefixes.items():
        made.save(folder / "shelf" / name)
    small.save(model, folder / "model")
    (folder / "keys").write_text(KEY + "\n")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    command = [
        sys.executable, "-m", "foreword", "serve", "--engine", "vllm", "--model", folder / "model", "--name", "base",
        "--prefix-dir", folder / "shelf", "--port", port, "--max-length", 256, "--dtype", "float32",
        "--prompt-logprobs",
        "--api-keys", folder / "keys", "--", "--enforce-eager", "--block-size", 32, "--num-gpu-blocks-override", 64,
        "--return-tokens-as-token-ids",
    ]  # fmt: skip
    environment = {
        **os.environ, "FOREWORD_CACHE": str(folder / "cache"), "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "PYTHONPATH": os.pathsep.join([str(Path(fw.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
    try:
        _wait(client, process, folder / "log")
        yield SimpleNamespace(client=client, model=model, prefixes=prefixes, tokenizer=tokenizer,
            shelf=folder / "shelf",
                              log=folder / "log", process=process)  # fmt: skip
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session, which holds vLLM's other processes
            process.wait(20)
        client.close()
        log.close()


def _wait(client, process, log):
    end = time.monotonic() + 400
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-5000:])


def ids(server, text):
    return server.tokenizer.encode(text, add_special_tokens=False)


def expected(server, task, tokens, n=TOKENS):
    return small.expected(server.model, server.prefixes.get(task), tokens, n)


def ask(server, path="/v1/completions", status=200, **body):
    body = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True, **body}
    answer = server.client.post(path, json=body)
    assert answer.status_code == status, f"{answer.text}\n{server.log.read_text()[-3000:]}"
    return answer.json()


def test_tasks_and_the_base_model_in_one_batch(server):
    asked = [(task, text) for text in small.TEXTS for task in ("a", "b", "base")]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda a: ask(server, model=a[0], prompt=a[1]), asked))
    for (task, text), answer in zip(asked, answers, strict=True):
        assert answer["choices"][0]["token_ids"] == expected(server, task, ids(server, text))
        assert answer["model"] == task and answer["usage"]["prompt_tokens"] == len(ids(server, text))
        assert answer["choices"][0]["prompt_token_ids"] == ids(server, text)


def test_several_prompts_and_answers(server):
    texts = small.TEXTS[:2]
    answer = ask(server, model="a", prompt=[ids(server, t) for t in texts], n=2, temperature=1.0, seed=3)
    assert len(answer["choices"]) == 4 and answer["usage"]["prompt_tokens"] == sum(len(ids(server, t)) for t in texts)
    greedy = ask(server, model="b", prompt=texts)
    assert [c["token_ids"] for c in greedy["choices"]] == [expected(server, "b", ids(server, t)) for t in texts]


def test_chats(server):
    text = "The film is"
    rendered = ids(server, f"user: {text}\nassistant:")
    for task in ("a", "b", "base"):
        messages = [{"role": "user", "content": text}]
        answer = ask(server, "/v1/chat/completions", model=task, messages=messages)
        assert answer["choices"][0]["token_ids"] == expected(server, task, rendered)
        assert answer["model"] == task and answer["usage"]["prompt_tokens"] == len(rendered)
        assert answer["prompt_token_ids"] == rendered


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams(server, path):
    text = "The film is"
    what = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    tokens = ids(server, text if "prompt" in what else f"user: {text}\nassistant:")
    body = {"model": "b", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True,
        "stream": True,
            "stream_options": {"include_usage": True}, **what}  # fmt: skip
    with server.client.stream("POST", path, json=body) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert [t for e in events for c in e["choices"] for t in c.get("token_ids") or []] == expected(server, "b", tokens)
    assert {e["model"] for e in events} == {"b"} and events[-1]["usage"]["prompt_tokens"] == len(tokens)


def test_scores_of_a_prompt(server):
    text = small.TEXTS[0]
    tokens = ids(server, text)
    answer = ask(server, model="a", prompt=text, prompt_logprobs=0)
    assert answer["choices"][0]["token_ids"] == expected(server, "a", tokens)
    tuning = fw.attach(server.model, server.prefixes["a"])
    scores = zoo.logits(server.model, input_ids=torch.tensor([tokens]))[0].log_softmax(-1)
    tuning.detach()
    theirs = answer["choices"][0]["prompt_logprobs"]
    assert len(theirs) == len(tokens) and theirs[0] is None
    for at in range(1, len(tokens)):
        assert abs(theirs[at][str(tokens[at])]["logprob"] - float(scores[at - 1, tokens[at]])) < 1e-3


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"model": "nobody", "prompt": "The"}, 404),
        ("/v1/completions", {"model": "../a", "prompt": "The"}, 404),
        ("/v1/completions", {"model": "a"}, 400),
        ("/v1/completions", {"model": "a", "prompt": ""}, 400),
        ("/v1/completions", {"model": "a", "prompt": "The", "echo": True, "logprobs": 1}, 400),
        ("/v1/completions", {"model": "a", "prompt": "The", "echo": True}, 400),
        ("/v1/completions", {"model": "a", "prompt": "The", "truncate_prompt_tokens": 3}, 400),
        ("/v1/completions", {"model": "a", "prompt": "The", "use_beam_search": True}, 400),
        ("/v1/completions", {"model": "a", "prompt": [9999]}, 400),
        ("/v1/completions", {"model": "a", "prompt": [5] * 240}, 400),  # with the prefix longer than the model
        ("/v1/completions", {"model": "a", "prompt": "The", "temperature": -1}, 400),
        ("/v1/completions", {"model": "base", "prompt": "The", "cache_salt": f"foreword:{'0' * 32}:3::a"}, 400),
        ("/v1/chat/completions", {"model": "a", "messages": []}, 400),
        (
            "/v1/chat/completions",
            {"model": "a", "messages": [{"role": "user", "content": "x"}], "chat_template": "x"},
            400,
        ),
        ("/v1/responses", {"model": "a", "input": "The"}, 400),
        ("/v1/embeddings", {"model": "a", "input": "The"}, 400),
        ("/tokenize", {"model": "a", "prompt": "The"}, 400),
    ],
)
def test_bad_requests_are_the_clients_fault(server, path, body, status):
    assert ask(server, path, status, **body)["error"]["message"]
    assert ask(server, model="a", prompt="The film")["choices"][0]["token_ids"] == expected(
        server, "a", ids(server, "The film")
    )


def test_keys(server):
    for path in ("/v1/models", "/v1/models/a"):
        assert server.client.get(path, headers={"Authorization": "Bearer no"}).status_code == 401
    answer = server.client.post("/v1/completions", json={"model": "nobody"}, headers={"Authorization": ""})
    assert answer.status_code == 401 and "nobody" not in answer.text


def test_prefixes_come_change_and_go(server):
    text, model = "The film is", server.model
    for seed in (7, 8):  # put there, then replaced
        made = small.prefix(model, 40, seed)
        made.save(server.shelf / "late")
        for _ in range(2):
            answer = ask(server, model="late", prompt=text)
            assert answer["choices"][0]["token_ids"] == small.expected(model, made, ids(server, text), TOKENS)
    assert [m["id"] for m in server.client.get("/v1/models").json()["data"]] == ["base", "a", "b", "late"]
    assert server.client.get("/v1/models/late").json()["parent"] == "base"
    import shutil

    shutil.rmtree(server.shelf / "late")
    assert ask(server, status=404, model="late", prompt=text)["error"]["code"] == "model_not_found"
    stranger = small.build("llama", seed=5)
    small.prefix(stranger, 4).save(server.shelf / "stranger")
    assert "other weights" in ask(server, status=409, model="stranger", prompt=text)["error"]["message"]


def test_what_was_loaded_is_in_vllms_own_numbers(server):
    shown = server.client.get("/metrics").text
    assert "vllm:external_prefix_cache_hits" in shown
