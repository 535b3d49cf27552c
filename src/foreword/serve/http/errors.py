"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}`` and a fitting status."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from foreword.errors import BudgetError, ConfigError, DeadlineError, ForewordError, OverloadedError, StoppedError

_FIELD = re.compile(r"(?!(?:body|query|path|str|int|float|none|nullable)$)[A-Za-z_]\w*")


class ApiError(HTTPException):
    """What a client is told.

    Args:
        kind: OpenAI's ``type``.
        code: a word for programs.
        param: the field of the request that is at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.kind, self.code, self.param = kind, code, param

    def body(self) -> dict[str, Any]:
        # A lone surrogate, which JSON can name, is no text that can be sent.
        message = self.detail.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status_code, self.headers)


def told(error: Exception) -> ApiError:
    """What a client is told of an error; what it can't help is not described."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OverloadedError):
        after = {"Retry-After": str(error.retry_after)}
        return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=after)
    if isinstance(error, BudgetError):
        if error.retry_after is None:
            return ApiError(400, str(error), code="no_room")
        after = {"Retry-After": str(error.retry_after)}
        return ApiError(429, str(error), kind="rate_limit_error", code="no_room", headers=after)
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), kind="timeout_error", code="timeout")
    if isinstance(error, StoppedError):
        after = {"Retry-After": "5"}
        return ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down", headers=after)
    if isinstance(error, ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, ForewordError):
        return ApiError(500, str(error), kind="server_error")
    return ApiError(500, "the server failed; its log has the reason under the request's id", kind="server_error")


async def on_http_error(request: Request, error: Exception) -> Response:
    """For errors that are meant, ours and those of the framework (no such route, no such method)."""
    if not isinstance(error, ApiError):
        assert isinstance(error, HTTPException)
        message = "there is no such page" if error.status_code == 404 else str(error.detail)
        error = ApiError(error.status_code, message, headers=error.headers)
    return error.response()


async def on_foreword_error(request: Request, error: Exception) -> Response:
    return told(error).response()


async def on_invalid(request: Request, error: Exception) -> Response:
    """A body that doesn't fit its schema: what is wrong with it, of several forms in the one that came nearest."""
    assert isinstance(error, RequestValidationError)
    nearest = max(error.errors(), key=lambda e: len(e["loc"]))
    if nearest["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json").response()
    # Names of fields and places in lists; what else stands there are the forms that a field may have.
    place = [str(part) for part in nearest["loc"] if isinstance(part, int) or _FIELD.fullmatch(part)]
    what = "is not a known parameter" if nearest["type"] == "extra_forbidden" else str(nearest["msg"])
    param = ".".join(place) or None
    message = f"{param}: {what}" if param else f"the body: {what}; expected a JSON object"
    return ApiError(400, message, param=param).response()


EXAMPLE = ApiError(400, "max_tokens: Input should be greater than or equal to 1", param="max_tokens").body()
