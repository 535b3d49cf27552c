"""POST /v1/completions: prompts continued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from foreword.serve.http.app_state import service_of
from foreword.serve.http.errors import ApiError
from foreword.serve.http.schemas import Completion, CompletionRequest
from foreword.serve.http.service import Service
from foreword.serve.http.shapes import Shape
from foreword.serve.http.streams import Answers
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
    return await _Completion(service, body, answers).response(request)


class _Completion(Shape):
    def __init__(self, service: Service, body: CompletionRequest, answers: Answers) -> None:
        super().__init__(service, body, answers, kind="cmpl", named="text_completion")
        self._asked = body.logprobs
        self._offsets: dict[int, int] = {}  # characters of tokens so far, by choice

    def choice(self, index: int, written: Written) -> dict[str, Any]:
        return self._made(index, written.text, written.scores, written.finish)

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._made(index, piece.text, piece.scores, piece.finish)

    def _made(self, index: int, text: str, scores: Sequence[TokenScore], finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, scores), "finish_reason": finish}

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self._asked is None:
            return None
        decode = self.service.tokenizer.decode
        tokens, offsets = [str(decode([s.token])) for s in scores], []
        for token in tokens:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(token)
        top = [{str(decode([t])): p for t, p in s.top} for s in scores] if self._asked else None
        return {"tokens": tokens, "token_logprobs": [s.logprob for s in scores], "top_logprobs": top,
                "text_offset": offsets}  # fmt: skip
