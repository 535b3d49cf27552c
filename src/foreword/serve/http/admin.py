"""Tasks loaded, replaced and unloaded while the server runs, from its folder of prefixes only.

A task changes between two steps of the engine: requests that were taken before finish with what they began with.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from foreword.errors import ForewordError, PrefixFileError
from foreword.serve.http.app_state import service_of
from foreword.serve.http.errors import ApiError
from foreword.serve.http.logs import event
from foreword.serve.http.schemas import LoadRequest, Task, Tasks
from foreword.serve.http.service import Service
from foreword.serve.shelf import check_name

router = APIRouter(prefix="/admin", tags=["administration"])


@router.get("/prefixes", response_model=Tasks, summary="What is served, and what could be")
async def list_prefixes(request: Request) -> Response:
    service = _open(request)
    shelf = service.settings.shelf
    available = await asyncio.to_thread(shelf.names) if shelf is not None else []
    return JSONResponse({"tasks": [_task(service, n) for n in service.library.names], "available": available})


@router.put("/prefixes/{name}", response_model=Task, summary="Load a task, or replace it",
            responses={201: {"model": Task, "description": "It is new"}})  # fmt: skip
async def put_prefix(request: Request, name: str, body: LoadRequest) -> Response:
    """Serve a prefix from the folder of prefixes under a name."""
    service = _open(request)
    shelf = service.settings.shelf
    if shelf is None:
        raise ApiError(403, "there is no folder of prefixes; start the server with --prefix-dir", code="no_prefix_dir")
    folder = body.folder if body.folder is not None else check_name(name)
    check_name(name)
    async with service.changing:
        try:
            prefix = await asyncio.to_thread(shelf.load, folder)
            new = await service.put(name, prefix, folder)
        except PrefixFileError as exc:
            raise ApiError(404 if "there is no prefix" in str(exc) else 400, str(exc), code="bad_prefix") from exc
        except ForewordError as exc:
            raise ApiError(400, str(exc), code="bad_prefix") from exc
    event("task replaced" if not new else "task loaded", task=name, folder=folder, id=request.state.notes.id)
    return JSONResponse(_task(service, name), 201 if new else 200)


@router.delete("/prefixes/{name}", response_model=Task, summary="Unload a task")
async def delete_prefix(request: Request, name: str) -> Response:
    service = _open(request)
    async with service.changing:
        service.task(name)
        gone = _task(service, name) if name in service.library else {}
        await service.drop(name)
    event("task unloaded", task=name, id=request.state.notes.id)
    return JSONResponse(gone)


def _open(request: Request) -> Service:
    service = service_of(request)
    request.state.notes.route = "admin"
    return service


def _task(service: Service, name: str) -> dict[str, object]:
    prefix, source = service.library[name], service.sources.get(name)
    return {
        "name": name, "folder": source.folder if source else None, "virtual_tokens": prefix.longest,
        "bytes": prefix.nbytes, "loaded": source.loaded if source else service.began,
    }  # fmt: skip
