"""GET /: a page to try the tasks on. Plain files, from this server only; what it may load and do is in its header.

The page asks the interfaces that everybody has, so nothing here knows of models. It needs no key itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from foreword.serve.http.errors import ApiError

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    # No inline scripts or styles, no other host; and no text becomes markup, whoever wrote it (trusted types).
    "Content-Security-Policy": "; ".join((
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    tag: str


def create_router() -> APIRouter:
    """The page's routes; its files are read now, once."""
    router = APIRouter(include_in_schema=False)
    held = {}
    for file in files("foreword.serve.http").joinpath("page").iterdir():
        body = file.read_bytes()
        held[file.name] = _File(body, _TYPES[file.name.rpartition(".")[2]], f'"{sha256(body).hexdigest()[:20]}"')

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _sent(request, held["index.html"])

    @router.api_route("/playground/{name}", methods=["GET", "HEAD"])
    async def part(request: Request, name: str) -> Response:
        if name not in held or name == "index.html":
            raise ApiError(404, "there is no such page")
        return _sent(request, held[name])

    return router


def _sent(request: Request, file: _File) -> Response:
    request.state.notes.route = "playground"
    headers = {**_HEADERS, "ETag": file.tag}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
