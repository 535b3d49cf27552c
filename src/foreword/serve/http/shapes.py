"""Answers as OpenAI's objects, whole or in chunks: what completions and chats have in common."""

from __future__ import annotations

import json
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from foreword.errors import ForewordError
from foreword.serve.http.errors import told
from foreword.serve.http.logs import event
from foreword.serve.http.schemas import Common
from foreword.serve.http.service import Service
from foreword.serve.http.streams import Answers, EventStream, unless_gone
from foreword.serve.request import Piece
from foreword.serve.written import Written


class Shape(ABC):
    """The answers to one request.

    Args:
        kind: what ids begin with.
        named: OpenAI's ``object``.
    """

    def __init__(self, service: Service, body: Common, answers: Answers, *, kind: str, named: str) -> None:
        self.service, self.answers = service, answers
        self.head: dict[str, Any] = {
            "id": f"{kind}-{uuid.uuid4().hex}", "object": named, "created": int(time.time()), "model": body.model,
        }  # fmt: skip
        self.n, self._streamed = body.n, bool(body.stream)
        self._usage_last = bool(body.stream_options and body.stream_options.include_usage)

    @abstractmethod
    def choice(self, index: int, written: Written) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """What an answer has more."""

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before anything is written."""
        return []

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": [choice], **({"usage": None} if self._usage_last else {})}

    async def response(self, request: Request) -> Response:
        """What the client is sent; the rows are free when it is, or when the client has left."""
        if self._streamed:
            seconds = self.service.settings.write_seconds
            return EventStream(self._events(request), done=self.answers.close, write_seconds=seconds)
        try:
            return JSONResponse(await unless_gone(request.receive, self._whole(request)))
        finally:
            self.answers.close()

    async def _whole(self, request: Request) -> dict[str, Any]:
        written: dict[int, Written] = {}
        async for number, piece in self.service.follow(request, self.answers):
            written.setdefault(number * self.n + piece.index, Written()).add(piece)
        return {**self.head, "choices": [self.choice(i, w) for i, w in sorted(written.items())], "usage": self._usage()}

    async def _events(self, request: Request) -> AsyncIterator[bytes]:
        pieces = self.service.follow(request, self.answers)
        try:
            for chunk in self.opening():
                yield _encoded(chunk)
            async for number, piece in pieces:
                if piece.text or piece.scores or piece.finish is not None:
                    yield _encoded(self.chunk(self.part(number * self.n + piece.index, piece)))
            if self._usage_last:
                yield _encoded({**self.head, "choices": [], "usage": self._usage()})
            yield b"data: [DONE]\n\n"
        except Exception as exc:
            if not isinstance(exc, ForewordError):
                event("stream failed", level=logging.ERROR, exc_info=exc, id=request.state.notes.id)
            error = told(exc)
            request.state.notes.fields["error"] = error.code or error.kind
            yield _encoded(error.body())
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    def _usage(self) -> dict[str, int]:
        prompt, written = self.answers.prompt_tokens, self.answers.written_tokens
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _encoded(chunk: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"
