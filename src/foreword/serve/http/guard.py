"""Around every request: an id, bounds on its body, its line in the log, its numbers, and an answer whatever happens.

Plain ASGI: nothing stands between a stream and its client, or between a client that leaves and its request.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foreword.serve.http.errors import ApiError, told
from foreword.serve.http.keys import Keys, check
from foreword.serve.http.logs import event
from foreword.serve.http.metrics import Metrics
from foreword.serve.http.streams import ClientGoneError

_GONE = 499  # as nginx has it: nobody was there to read the status
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(slots=True)
class Notes:
    """What is known about a request, for its line in the log and its numbers. Routes fill it in."""

    id: str
    route: str = "other"
    model: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)


class Guard:
    """The outermost layer of the application.

    Args:
        keys: for ``/v1``; none: anybody may ask.
        admin_keys: for ``/admin``; none: nobody may.
        most_bytes: of a body.
        body_seconds: that a body may take to arrive.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, keys: Keys, admin_keys: Keys, most_bytes: int, body_seconds: float
    ) -> None:
        self.app, self.metrics, self.keys, self.admin_keys = app, metrics, keys, admin_keys
        self.most_bytes, self.body_seconds = most_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        notes = Notes(given if _ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["notes"] = notes
        status = 0

        async def say(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", notes.id.encode())]
            await send(message)

        try:
            self._check_key(scope)  # before anything of the body is read
            await self.app(scope, self._bounded(receive), say)
        except ApiError as exc:
            await exc.response()(scope, receive, say)
        except ClientGoneError:
            status = _GONE
        except Exception as exc:
            event("request failed", level=logging.ERROR, exc_info=exc, id=notes.id)
            begun = status
            status = 500
            if not begun:
                await told(exc).response()(scope, receive, say)
        finally:
            self._note(scope, notes, status or _GONE)

    def _check_key(self, scope: Scope) -> None:
        authorization = dict(scope["headers"]).get(b"authorization", b"").decode("utf-8", "surrogateescape")
        if scope["path"].startswith("/v1/"):
            check(authorization, self.keys)
        elif scope["path"].startswith("/admin/"):
            check(authorization, self.admin_keys, admin=True)

    def _bounded(self, receive: Receive) -> Receive:
        """A body of more bytes or seconds than there may be ends in an error where it is read."""
        seen, whole, deadline = 0, False, time.monotonic() + self.body_seconds

        async def bounded() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self.body_seconds:g} s") from None
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > self.most_bytes:
                raise ApiError(413, f"the body has more than {self.most_bytes:,} bytes", code="body_too_large")
            return message

        return bounded

    def _note(self, scope: Scope, notes: Notes, status: int) -> None:
        seconds = time.monotonic() - notes.began
        self.metrics.requests.labels(notes.route, notes.model, str(status)).inc()
        self.metrics.seconds.labels(notes.route).observe(seconds)
        event(
            "request", id=notes.id, method=scope["method"], path=scope["path"], status=status,
            milliseconds=round(1000 * seconds, 1), model=notes.model or None, **notes.fields,
        )  # fmt: skip
