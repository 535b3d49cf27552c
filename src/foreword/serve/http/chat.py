"""POST /v1/chat/completions: conversations continued, in the model's own chat template."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from foreword.serve.http.app_state import service_of
from foreword.serve.http.errors import ApiError
from foreword.serve.http.schemas import ChatCompletion, ChatRequest
from foreword.serve.http.service import Service, new_id, usage
from foreword.serve.http.streams import Answers, unless_gone
from foreword.serve.request import Piece, TokenScore
from foreword.serve.written import Written

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, summary="Continue a conversation")
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """The assistant's next message, with a task's prefix or without. With ``stream``, as server-sent events."""
    service = service_of(request)
    task = service.open(request, "chat", body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is for logprobs=true", param="top_logprobs")
    prompt = await service.chat_prompt([m.plain() for m in body.messages])
    if not prompt:
        raise ApiError(400, "the messages have no token; write at least one word", param="messages")
    room = service.engine.length - len(prompt)
    max_tokens = body.max_completion_tokens or body.max_tokens or max(1, min(room, service.settings.chat_tokens))
    service.check_size([prompt], body, max_tokens, "messages")
    if service.settings.log_prompts:
        request.state.notes.fields["messages"] = [m.plain() for m in body.messages]
    sampling = body.sampling(max_tokens, (body.top_logprobs or 0) if body.logprobs else None)
    answers = service.ask([prompt], sampling, task)
    shape = _Shape(service, body, answers)
    if body.stream:
        return service.stream(request, answers, shape.opening(), shape.chunk, shape.tail)
    return JSONResponse(await unless_gone(request.receive, shape.whole(request)))


class _Shape:
    """Pieces as OpenAI's objects."""

    def __init__(self, service: Service, body: ChatRequest, answers: Answers) -> None:
        self.service, self.body, self.answers = service, body, answers
        self.head = {"id": new_id("chatcmpl"), "object": "chat.completion.chunk" if body.stream else "chat.completion",
                     "created": int(time.time()), "model": body.model}  # fmt: skip
        self.usage = bool(body.stream_options and body.stream_options.include_usage)

    async def whole(self, request: Request) -> dict[str, Any]:
        written = [Written() for _ in range(self.body.n)]
        async for _, piece in self.service.follow(request, self.answers):
            written[piece.index].add(piece)
        choices = [
            {"index": i, "message": {"role": "assistant", "content": w.text}, "logprobs": self._logprobs(w.scores),
             "finish_reason": w.finish}
            for i, w in enumerate(written)
        ]  # fmt: skip
        return {**self.head, "choices": choices, "usage": usage(self.answers)}

    def opening(self) -> list[dict[str, Any]]:
        return [self._made(i, {"role": "assistant", "content": ""}, (), None) for i in range(self.body.n)]

    def chunk(self, number: int, piece: Piece) -> dict[str, Any] | None:
        if not piece.text and not piece.scores and piece.finish is None:
            return None
        return self._made(piece.index, {"content": piece.text} if piece.text else {}, piece.scores, piece.finish)

    def tail(self) -> dict[str, Any] | None:
        return {**self.head, "choices": [], "usage": usage(self.answers)} if self.usage else None

    def _made(
        self, index: int, delta: dict[str, str], scores: Sequence[TokenScore], finish: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(scores), "finish_reason": finish}
        return {**self.head, "choices": [choice], **({"usage": None} if self.usage else {})}

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {
            "content": [
                {**self._token(s.token, s.logprob), "top_logprobs": [self._token(t, p) for t, p in s.top]}
                for s in scores
            ]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = str(self.service.tokenizer.decode([token]))
        # A part of a character has bytes that its text doesn't tell.
        return {"token": text, "bytes": None if "\ufffd" in text else list(text.encode()), "logprob": logprob}
