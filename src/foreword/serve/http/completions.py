"""POST /v1/completions: prompts continued."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from foreword.serve.http.app_state import service_of
from foreword.serve.http.errors import ApiError
from foreword.serve.http.schemas import Completion, CompletionRequest
from foreword.serve.http.service import Service, new_id, usage
from foreword.serve.http.streams import Answers, unless_gone
from foreword.serve.request import Piece, TokenScore
from foreword.serve.written import Written

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=Completion, summary="Continue prompts")
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Continue one prompt or several, with a task's prefix or without. With ``stream``, as server-sent events."""
    service = service_of(request)
    task = service.open(request, "completions", body)
    max_tokens = body.max_tokens or 16
    prompts = await service.encode(body.prompts())
    if not all(prompts):
        raise ApiError(400, "a prompt has no token; write at least one word", param="prompt")
    service.check_size(prompts, body, max_tokens, "prompt")
    if service.settings.log_prompts:
        request.state.notes.fields["prompt"] = body.prompt
    answers = service.ask(prompts, body.sampling(max_tokens, body.logprobs), task)
    shape = _Shape(service, body, answers)
    if body.stream:
        return service.stream(request, answers, (), shape.chunk, shape.tail)
    return JSONResponse(await unless_gone(request.receive, shape.whole(request)))


class _Shape:
    """Pieces as OpenAI's objects."""

    def __init__(self, service: Service, body: CompletionRequest, answers: Answers) -> None:
        self.service, self.body, self.answers = service, body, answers
        self.head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()),
                     "model": body.model}  # fmt: skip
        self.usage = bool(body.stream_options and body.stream_options.include_usage)
        self._offsets: dict[int, int] = {}  # characters of tokens so far, by choice

    async def whole(self, request: Request) -> dict[str, Any]:
        written: dict[int, Written] = {}
        async for number, piece in self.service.follow(request, self.answers):
            written.setdefault(number * self.body.n + piece.index, Written()).add(piece)
        choices = [
            {"index": i, "text": w.text, "logprobs": self._logprobs(i, w.scores), "finish_reason": w.finish}
            for i, w in sorted(written.items())
        ]
        return {**self.head, "choices": choices, "usage": usage(self.answers)}

    def chunk(self, number: int, piece: Piece) -> dict[str, Any] | None:
        if not piece.text and not piece.scores and piece.finish is None:
            return None
        index = number * self.body.n + piece.index
        choice = {"index": index, "text": piece.text, "logprobs": self._logprobs(index, piece.scores),
                  "finish_reason": piece.finish}  # fmt: skip
        return {**self.head, "choices": [choice], **({"usage": None} if self.usage else {})}

    def tail(self) -> dict[str, Any] | None:
        return {**self.head, "choices": [], "usage": usage(self.answers)} if self.usage else None

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        decode = self.service.tokenizer.decode
        tokens, offsets = [str(decode([s.token])) for s in scores], []
        for token in tokens:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(token)
        top = [{str(decode([t])): p for t, p in s.top} for s in scores] if self.body.logprobs else None
        return {"tokens": tokens, "token_logprobs": [s.logprob for s in scores], "top_logprobs": top,
                "text_offset": offsets}  # fmt: skip
