"""Tasks as models: what vLLM is asked, what clients are told, what never gets through. vLLM itself: tests/on_vllm."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

import foreword as fw
import zoo
from foreword.serve.http.keys import Keys
from foreword.serve.vllm.answers import Events, Renamer
from foreword.serve.vllm.bodies import VARIABLE
from foreword.serve.vllm.checkpoint import Checkpoint
from foreword.serve.vllm.middleware import Front, TaskModels
from foreword.serve.vllm.options import Options
from foreword.serve.vllm.rows import Shape
from foreword.serve.vllm.tasks import Tasks

LENGTH, KEY = 3, "a-key-of-the-tests"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    model = zoo.build("llama")
    prefix(model).save(folder / "task")
    model.save_pretrained(folder.parent / "model")
    return folder


def prefix(model, length=LENGTH, seed=0):
    return fw.Prefix.from_tensors(model, zoo.random_prefix(model, fw.sites(model), length, seed))


async def echo(request):
    """In vLLM's place: what arrived, where vLLM's own answers have what is changed on the way back."""
    body = await request.json()
    ids = body.get("prompt") or []
    rows = ids if ids and isinstance(ids[0], list) else [ids]
    usage = {
        "prompt_tokens": sum(map(len, rows)) or 10,
        "completion_tokens": 2,
        "total_tokens": (sum(map(len, rows)) or 10) + 2,
    }
    choice = {"index": 0, "text": "x", "prompt_token_ids": rows[0], "prompt_logprobs": [None, *range(1, len(rows[0]))]}
    answer = {"model": body.get("model"), "usage": usage, "choices": [choice], "asked": body}
    if not body.get("stream"):
        return JSONResponse(answer)

    async def events():
        first, last = ({**answer, "usage": None}, {**answer, "choices": []})
        whole = f"data: {json.dumps(first)}\n\ndata: {json.dumps(last)}\n\ndata: [DONE]\n\n"
        for at in range(0, len(whole), 7):
            yield whole[at : at + 7]

    return StreamingResponse(events(), media_type="text/event-stream")


async def models(request):
    return JSONResponse(
        {"object": "list", "data": [{"id": "base", "object": "model", "created": 1, "owned_by": "vllm", "root": "/m"}]}
    )


@pytest.fixture
def client(shelf):
    return made(shelf)


def made(shelf, *, keys=(), others=False, **options):
    post = [
        Route(p, echo, methods=["POST"])
        for p in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/inference/v1/generate")
    ]
    app = Starlette(
        routes=[*post, Route("/v1/models", models), Route("/v1/models/{name}", models), Route("/health", models)]
    )
    tasks = Tasks(shelf, 0, shape=Shape(2, 2, 8), checkpoint=Checkpoint.of(str(shelf.parent / "model")))
    front = Front(
        tasks, Options(str(shelf), 0, "<pad>", **options), ("base", "alias"), zoo.tokenizer(), Keys(keys), others=others
    )
    app.add_middleware(TaskModels, front=front)
    return TestClient(app)


def ask(client, path="/v1/completions", status=200, **body):
    answer = client.post(path, json={"model": "task", **body})
    assert answer.status_code == status, answer.text
    return answer.json()


def test_prompts_get_placeholders_and_the_salt(client, shelf):
    tokenizer = zoo.tokenizer()
    digest = Tasks(shelf, 0).get("task").salt.digest
    ids = tokenizer.encode("The film", add_special_tokens=False)
    for prompt, wanted in (
        ("The film", [0] * LENGTH + ids), (ids, [0] * LENGTH + ids),
        ([ids, [5]], [[0] * LENGTH + ids, [0] * LENGTH + [5]]),
        (["The film"], [[0] * LENGTH + ids]),
    ):  # fmt: skip
        answer = ask(client, prompt=prompt)
        assert answer["asked"]["prompt"] == wanted and answer["asked"]["model"] == "base" and answer["model"] == "task"
        assert answer["asked"]["cache_salt"] == f"foreword:{digest}:{LENGTH}::task"
        several = wanted if isinstance(wanted[0], list) else [wanted]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, several)) - LENGTH * len(several)
        choice = answer["choices"][0]
        assert choice["prompt_token_ids"] == several[0][LENGTH:]
        assert choice["prompt_logprobs"] == [None, *range(LENGTH + 1, len(several[0]))]
    own = ask(client, prompt="a", cache_salt="mine")["asked"]["cache_salt"]
    assert own.startswith(f"foreword:{digest}:{LENGTH}:") and "mine" not in own


def test_chats_get_placeholders_through_the_template(client):
    body = {"messages": [{"role": "user", "content": "Hello"}], "chat_template_kwargs": {"mood": "glad"}, "strength": 1}
    asked = ask(client, "/v1/chat/completions", **body)["asked"]
    assert asked["chat_template_kwargs"] == {"mood": "glad", VARIABLE: "<pad>" * LENGTH}
    assert asked["model"] == "base" and asked["cache_salt"].startswith("foreword:") and "strength" not in asked


def test_streams_however_they_are_cut(client):
    answer = client.post("/v1/completions", json={"model": "task", "prompt": [[5, 6], [7]], "stream": True})
    first, last, done = (line for line in answer.text.split("\n") if line.startswith("data: "))
    assert (
        done == "data: [DONE]" and json.loads(first[6:])["model"] == "task" and json.loads(first[6:])["usage"] is None
    )
    assert json.loads(last[6:])["usage"]["prompt_tokens"] == 3
    events = b'data: {"model": "base", "choices": [{}], "usage": {"prompt_tokens": 9}}\r\n\r\n: ping\n\ndata: {"half'
    task = SimpleNamespace(name="t", length=4)
    for size in range(1, len(events)):
        made = Events(Renamer(task, "<pad>"))
        out = b"".join(made.feed(events[i : i + size]) for i in range(0, len(events), size)) + made.feed(b"", last=True)
        assert b'"prompt_tokens": 5' in out and b'"model": "t"' in out and out.endswith(b': ping\n\ndata: {"half')


def test_the_base_model_is_left_as_it_is(client):
    for name in ("base", "alias", None):
        body = {"prompt": [1, 2], "cache_salt": "own", "echo": True, **({"model": name} if name else {})}
        answer = client.post("/v1/completions", json=body)
        assert answer.json()["asked"] == body and answer.json()["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"), ({"prompt": [True]}, "prompt"), ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1.5]]}, "prompt"),
        ({"prompt": None}, "prompt"), ({}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"), ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "suffix": "y"}, "suffix"), ({"prompt": "a", "prompt_embeds": "AA"}, "prompt_embeds"),
        ({"prompt": "a", "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "a", "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt": "a", "kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ({"prompt": "a", "strength": 0.5}, "strength"),
        ({"prompt": "a", "cache_salt": "foreword:other"}, "cache_salt"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt"),
        ({"prompt": "a", "add_special_tokens": "no"}, "add_special_tokens"),
    ],
)  # fmt: skip
def test_what_would_be_answered_wrongly_is_refused(client, body, param):
    assert ask(client, status=400, **body)["error"]["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"), ({}, "messages"), ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {VARIABLE: "x"}},
            "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True}, "add_special_tokens"),
    ],
)  # fmt: skip
def test_chats_that_would_be_answered_wrongly_are_refused(client, body, param):
    assert ask(client, "/v1/chat/completions", status=400, **body)["error"]["param"] == param


def test_no_client_names_a_prefix_by_its_salt(client):
    salt = f"foreword:{'0' * 32}:3::task"
    for path, body in (
        ("/v1/completions", {"model": "base", "prompt": [0, 0, 0, 5], "cache_salt": salt}),
        ("/inference/v1/generate", {"token_ids": [0], "sampling_params": {}, "cache_salt": salt}),
        ("/inference/v1/generate", {"a": [{"b": {"cache_salt": salt}}]}),
        ("/v1/chat/completions", {"messages": [], "chat_template_kwargs": {VARIABLE: "x"}}),
    ):
        answer = client.post(path, content=json.dumps(body).replace("foreword:", "\\u0066oreword:"))
        assert answer.status_code == 400, body
    assert ask(client, "/v1/responses", status=400, input="x")["error"]["message"].startswith("a task is asked at")


def test_unknown_tasks_and_those_that_cannot_be_served(client, shelf):
    error = ask(client, status=404, model="tusk", prompt="a")["error"]
    assert error["code"] == "model_not_found" and "did you mean task?" in error["message"]
    for name in ("../task", "a" * 300, "/etc"):
        ask(client, status=404, model=name, prompt="a")
    assert client.post("/v1/completions", json={"model": "lora", "prompt": [1]}).status_code == 404
    assert made(shelf, others=True).post("/v1/completions", json={"model": "lora", "prompt": [1]}).status_code == 200


def test_prefixes_of_other_models_and_damaged_ones(client, shelf):
    other = zoo.build("llama", seed=5)
    prefix(other).save(shelf / "stranger")
    prefix(zoo.build("qwen3")).save(shelf / "qwen")
    (prefix(zoo.build("llama")).save(shelf / "damaged") / "prefix.safetensors").write_bytes(b"no")
    try:
        assert "made on other weights" in ask(client, status=409, model="stranger", prompt="a")["error"]["message"]
        assert ask(client, status=409, model="damaged", prompt="a")["error"]["code"] == "task_not_servable"
        assert ask(client, prompt="a")["model"] == "task"
    finally:
        import shutil

        for name in ("stranger", "qwen", "damaged"):
            shutil.rmtree(shelf / name)


def test_prefixes_come_go_and_change_without_a_restart(client, shelf):
    model = zoo.build("llama")
    ask(client, status=404, model="late", prompt="a")
    prefix(model, 4).save(shelf / "late")
    first = ask(client, model="late", prompt=[5])["asked"]
    assert first["prompt"] == [0] * 4 + [5]
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["base", "late", "task"]
    assert client.get("/v1/models/late").json()["parent"] == "base"
    prefix(model, 4, seed=1).save(shelf / "late")
    assert ask(client, model="late", prompt=[5])["asked"]["cache_salt"] != first["cache_salt"]
    import shutil

    shutil.rmtree(shelf / "late")
    ask(client, status=404, model="late", prompt="a")
    assert client.get("/v1/models/late").status_code == 404
    assert client.get("/v1/models/base").json()["data"]


def test_keys_come_before_everything(shelf):
    client = made(shelf, keys=[KEY])
    assert client.get("/health").status_code == 200
    for path in ("/v1/models", "/v1/models/task"):
        assert client.get(path).status_code == 401
    for body in ({"model": "nobody"}, {"model": "task", "prompt": "a"}, {"model": "base", "prompt": [1]}):
        assert client.post("/v1/completions", json=body).status_code == 401
        assert client.post("/inference/v1/generate", json=body).status_code == 401
    client.headers["Authorization"] = f"Bearer {KEY}"
    ask(client, prompt="a")


def test_scores_of_prompts_where_the_server_gives_them(shelf):
    assert ask(made(shelf, prompt_logprobs=True), prompt="a", prompt_logprobs=0)["asked"]["prompt_logprobs"] == 0


def test_bodies_that_are_no_json_are_vllms(client):
    with pytest.raises(json.JSONDecodeError):  # of the application in vLLM's place: it was given what was sent
        client.post("/v1/completions", content=b"{no")
