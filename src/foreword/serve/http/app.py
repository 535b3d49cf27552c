"""The application: routes, errors, and the guard around them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

import foreword
from foreword.errors import ForewordError
from foreword.serve.engine import Engine
from foreword.serve.http import admin, chat, completions, listing, playground, shares
from foreword.serve.http.errors import EXAMPLE, on_foreword_error, on_http_error, on_invalid
from foreword.serve.http.guard import Guard
from foreword.serve.http.schemas import Error
from foreword.serve.http.service import Service, Settings

_ERRORS = {
    400: "The request is malformed or asks for too much", 401: "The key is missing or wrong", 403: "Not allowed here",
    404: "There is no such model", 408: "The body did not arrive in time", 413: "The body is too large",
    429: "The queue is full: try again after Retry-After seconds", 500: "The server failed",
    503: "The server is shutting down", 504: "No answer in time",
}  # fmt: skip


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application over an engine, which runs already and which the caller stops."""
    app = FastAPI(
        title="foreword",
        version=foreword.__version__,
        description="Tasks of one frozen model, through the interface that OpenAI's clients speak.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        responses={s: {"model": Error, "description": d} for s, d in _ERRORS.items()},
    )
    service = Service(engine, settings)
    app.state.service = service
    for router in (completions.router, chat.router, shares.router, listing.router, admin.router):
        app.include_router(router)
    if settings.playground:
        app.include_router(playground.create_router())
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ForewordError, on_foreword_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_middleware(
        Guard, metrics=service.metrics, keys=settings.keys, admin_keys=settings.admin_keys,
        most_bytes=settings.body_bytes, body_seconds=settings.body_seconds,
    )  # fmt: skip
    app.openapi = lambda: _specification(app)  # type: ignore[method-assign]
    return app


def _specification(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, but a body that doesn't fit is a 400 here, and keys are bearer tokens."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path, operations in made["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                for status, response in operation["responses"].items():
                    if int(status) >= 400:
                        response["content"]["application/json"]["example"] = EXAMPLE
                if path.startswith(("/v1", "/admin")):
                    operation["security"] = [{"key": []}]
        made.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for unused in ("HTTPValidationError", "ValidationError"):
            made["components"].get("schemas", {}).pop(unused, None)
        app.openapi_schema = made
    return app.openapi_schema
