"""``vllm serve --middleware foreword.serve.vllm.middleware.TaskModels``: each prefix of the folder is a model.

A request whose ``model`` is a task is made into one for the base model (``bodies.py``), its answer into the task's
(``answers.py``). All that it has to know is in vLLM's own configuration, with the connector's options.

vLLM puts its own middlewares, the one for API keys too, inside of this one. So keys are compared here as well, before
anything is read or told.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foreword.errors import ConfigError, ForewordError, nearest
from foreword.serve.http.errors import ApiError, told
from foreword.serve.http.keys import Keys, check, read_keys
from foreword.serve.shelf import NoPrefixError
from foreword.serve.vllm.answers import Events, Renamer
from foreword.serve.vllm.bodies import CHAT, COMPLETIONS, check_salts, prompts_in, translate
from foreword.serve.vllm.options import Options
from foreword.serve.vllm.tasks import Task, Tasks

_OPEN = ("/health", "/ping", "/metrics", "/version", "/load")
_MOST_BYTES = 32 << 20


class Front:
    """What the middleware knows of the server behind it.

    Args:
        base: vLLM's names of the model, the one that it gives first.
        tokenizer: the model's.
        keys: that clients must show; none: anybody may ask.
        others: whether vLLM serves more models than these (LoRA), which it knows itself.
    """

    def __init__(
        self, tasks: Tasks, options: Options, base: tuple[str, ...], tokenizer: Any, keys: Keys, *, others: bool = False
    ) -> None:
        self.tasks, self.options, self.base, self.keys, self.others = tasks, options, base, keys, others
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, "foreword")  # tokenizers are used by one thread at a time

    @classmethod
    def of(cls, state: Any) -> Front:
        """From the state that vLLM's application keeps."""
        from vllm.tokenizers.registry import cached_tokenizer_from_config

        from foreword.serve.vllm.checkpoint import Checkpoint
        from foreword.serve.vllm.engine import options_of, shape_of

        config, args = state.vllm_config, state.args
        options = options_of(config)
        checkpoint = Checkpoint.of(config.model_config.model, config.model_config.revision)
        tasks = Tasks(options.prefixes, options.placeholder, shape=shape_of(config), checkpoint=checkpoint)
        own = read_keys(Path(options.api_keys) if options.api_keys else None, "FOREWORD_API_KEYS")
        given = [k for k in (getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]) if k]
        base = tuple(args.served_model_name or [args.model])
        return cls(
            tasks, options, base, cached_tokenizer_from_config(config.model_config),
            own if len(own) else Keys(given), others=config.lora_config is not None,
        )  # fmt: skip

    async def task(self, name: Any) -> Task | None:
        """The task of that name; None where vLLM is to answer itself.

        Raises:
            ApiError: there is none, or it can't be served.
        """
        if not isinstance(name, str) or not name or name in self.base:
            return None
        try:
            return await self._do(self.tasks.get, name)
        except (NoPrefixError, ConfigError) as exc:
            if self.others:
                return None
            names = [*self.base, *await self._do(self.tasks.names)]
            message = f"there is no model {name[:80]!r}; {nearest(name, names)}"
            raise ApiError(404, message, code="model_not_found", param="model") from exc
        except ForewordError as exc:
            raise ApiError(409, str(exc), code="task_not_servable", param="model") from exc

    async def translated(self, body: dict[str, Any], path: str, task: Task) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            return translate(body, path, task, self.base[0], self.options.placeholder_text, self._tokenize,
                             all_logprobs=self.options.prompt_logprobs)  # fmt: skip

        return await self._do(make)

    def _tokenize(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    async def _do(self, what: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, what, *arguments)


class TaskModels:
    """The middleware. Plain ASGI: streams pass as they come.

    Args:
        front: known beforehand, in tests; else made of vLLM's state with the first request.
    """

    def __init__(self, app: ASGIApp, front: Front | None = None) -> None:
        self.app, self._front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", "")).rstrip("/")
        if scope["type"] != "http" or path in _OPEN or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        try:
            front = self._known(scope)
            check(_header(scope, b"authorization", "surrogateescape"), front.keys)
            if scope["method"] == "GET" and (path == "/v1/models" or path.startswith("/v1/models/")):
                await self._models(front, path, scope, receive, send)
            elif scope["method"] == "POST":
                await self._post(front, path, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except ApiError as exc:
            await exc.response()(scope, receive, send)
        except ForewordError as exc:
            await told(exc).response()(scope, receive, send)

    def _known(self, scope: Scope) -> Front:
        if self._front is None:
            self._front = Front.of(scope["app"].state)
        return self._front

    async def _post(self, front: Front, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await _read(receive)
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None  # vLLM says what is wrong with it, or it is a form
        check_salts(body)
        task = await front.task(body.get("model")) if isinstance(body, dict) else None
        if task is None:
            await self.app(scope, _given(raw, receive), send)
            return
        assert isinstance(body, dict)
        if path not in (COMPLETIONS, CHAT):
            raise ApiError(400, f"a task is asked at {COMPLETIONS} and {CHAT}, not at {path}", param="model")
        raw = json.dumps(await front.translated(body, path, task)).encode()
        renamer = Renamer(task, front.options.placeholder_text, prompts_in(body))
        await self.app(_sized(scope, raw), _given(raw, receive), _Changed(send, renamer))

    async def _models(self, front: Front, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's models and the tasks; vLLM's description of the base model as each task's."""
        name = path.removeprefix("/v1/models").removeprefix("/")
        if name and await front.task(name) is None:
            await self.app(scope, receive, send)
            return
        names = [n for n in await front._do(front.tasks.names) if n not in front.base]

        def listed(body: Any) -> Any:
            base = body["data"][0] if body.get("data") else {"object": "model"}
            cards = [{**base, "id": n, "root": n, "parent": front.base[0], "permission": []} for n in names]
            return next(c for c in cards if c["id"] == name) if name else {**body, "data": [*body["data"], *cards]}

        whole = {**scope, "path": scope.get("root_path", "") + "/v1/models", "raw_path": b"/v1/models"}
        await self.app(whole, receive, _Changed(send, None, listed))


class _Changed:
    """``send`` for an answer that is changed on its way: whole where it is JSON, event by event in a stream."""

    def __init__(self, send: Send, renamer: Renamer | None, change: Any = None) -> None:
        self._send, self._events = send, Events(renamer) if renamer is not None else None
        self._change = renamer.answer if renamer is not None else change
        self._start: Message | None = None
        self._kind, self._body = "", b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._kind = _header(message, b"content-type").split(";")[0]
            if self._kind == "application/json" and message["status"] == 200:
                self._start = message  # its length is known at the end
            else:
                await self._send(message)
        elif self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                body = json.dumps(self._change(json.loads(self._body)), ensure_ascii=False).encode()
                await self._send(_sized(self._start, body))
                await self._send({"type": "http.response.body", "body": body})
        elif self._kind == "text/event-stream" and self._events is not None:
            more = message.get("more_body", False)
            await self._send({**message, "body": self._events.feed(message.get("body", b""), last=not more)})
        else:
            await self._send(message)


def _header(message: Mapping[str, Any], name: bytes, errors: str = "replace") -> str:
    return next((v.decode("utf-8", errors) for k, v in message["headers"] if k.lower() == name), "")


def _sized(message: Mapping[str, Any], body: bytes) -> dict[str, Any]:
    """A request's scope or an answer's start, for a body of another length."""
    headers = [(k, v) for k, v in message["headers"] if k.lower() != b"content-length"]
    return {**message, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


async def _read(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client left")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MOST_BYTES:
            raise ApiError(413, f"the body has more than {_MOST_BYTES:,} bytes", code="body_too_large")
        more = message.get("more_body", False)
    return b"".join(parts)


def _given(body: bytes, receive: Receive) -> Receive:
    """``receive`` for a body that was read already; then what comes after it, the client's leaving."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
