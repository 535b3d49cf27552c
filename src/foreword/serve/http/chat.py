"""POST /v1/chat/completions: conversations continued, in the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from foreword.serve.http.app_state import service_of
from foreword.serve.http.errors import ApiError
from foreword.serve.http.schemas import ChatCompletion, ChatRequest
from foreword.serve.http.service import Service
from foreword.serve.http.shapes import Shape
from foreword.serve.http.streams import Answers
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
    messages = [m.plain() for m in body.messages]
    prompt = await service.chat_prompt(messages)
    if not prompt:
        raise ApiError(400, "the messages have no token; write at least one word", param="messages")
    room = service.engine.length - len(prompt)
    max_tokens = body.max_completion_tokens or body.max_tokens or max(1, min(room, service.settings.chat_tokens))
    service.check_size([prompt], body, max_tokens, "messages")
    if service.settings.log_prompts:
        request.state.notes.fields["messages"] = messages
    sampling = body.sampling(max_tokens, (body.top_logprobs or 0) if body.logprobs else None)
    return await _Chat(service, body, service.ask([prompt], sampling, task)).response(request)


class _Chat(Shape):
    def __init__(self, service: Service, body: ChatRequest, answers: Answers) -> None:
        named = "chat.completion.chunk" if body.stream else "chat.completion"
        super().__init__(service, body, answers, kind="chatcmpl", named=named)
        self._asked = bool(body.logprobs)

    def choice(self, index: int, written: Written) -> dict[str, Any]:
        message = {"role": "assistant", "content": written.text}
        return {"index": index, "message": message, **self._rest(written.scores, written.finish)}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, **self._rest(piece.scores, piece.finish)}

    def opening(self) -> list[dict[str, Any]]:
        first = {"delta": {"role": "assistant", "content": ""}, **self._rest((), None)}
        return [self.chunk({"index": i, **first}) for i in range(self.n)]

    def _rest(self, scores: Sequence[TokenScore], finish: str | None) -> dict[str, Any]:
        return {"logprobs": self._logprobs(scores), "finish_reason": finish}

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._asked:
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
