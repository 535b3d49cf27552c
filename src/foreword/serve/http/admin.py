"""Tasks loaded, replaced and unloaded while the server runs, from its folder of prefixes only.

A task changes between two steps of the engine: requests that were taken before finish with what they began with.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from foreword.errors import ConfigError, MismatchError, PrefixFileError
from foreword.serve.http.app_state import service_of
from foreword.serve.http.errors import ApiError
from foreword.serve.http.logs import event
from foreword.serve.http.schemas import LoadRequest, Task, Tasks
from foreword.serve.http.service import Service
from foreword.serve.shelf import NoPrefixError, check_name
from foreword.serve.tiers.usage import TaskUse

router = APIRouter(prefix="/admin", tags=["administration"])


@router.get("/prefixes", response_model=Tasks, summary="What is served, and what could be")
async def list_prefixes(request: Request) -> Response:
    service = _open(request)
    shelf = service.settings.shelf
    available = await asyncio.to_thread(shelf.names) if shelf is not None else []
    tasks = [_task(service, name, use) for name, use in service.library.usage.tasks.items()]
    return JSONResponse({"tasks": tasks, "available": available})


@router.put("/prefixes/{name}", response_model=Task, summary="Load a task, or replace it",
            responses={201: {"model": Task, "description": "It is new"}})  # fmt: skip
async def put_prefix(request: Request, name: str, body: LoadRequest) -> Response:
    """Serve a prefix from the folder of prefixes under a name."""
    service = _open(request)
    shelf = service.settings.shelf
    if shelf is None:
        raise ApiError(403, "there is no folder of prefixes; start the server with --prefix-dir", code="no_prefix_dir")
    folder = body.folder if body.folder is not None else name
    async with service.changing:
        try:
            check_name(name)
            prefix = await asyncio.to_thread(shelf.load, folder)
            new = await service.put(name, prefix, folder, priority=body.priority, pinned=body.pinned)
        except NoPrefixError as exc:
            raise ApiError(404, str(exc), code="no_prefix", param="folder") from exc
        except (ConfigError, MismatchError, PrefixFileError) as exc:
            raise ApiError(400, str(exc), code="bad_prefix") from exc
        made = _task(service, name, service.library.usage.tasks[name])
    event("task loaded" if new else "task replaced", task=name, folder=folder, id=request.state.notes.id)
    return JSONResponse(made, 201 if new else 200)


@router.delete("/prefixes/{name}", response_model=Task, summary="Unload a task")
async def delete_prefix(request: Request, name: str) -> Response:
    """Serve it no longer. What it was is the answer."""
    service = _open(request)
    async with service.changing:
        if service.task(name) is None:
            raise ConfigError("the base model can't be unloaded; expected a task")
        gone = _task(service, name, service.library.usage.tasks[name])
        await service.drop(name)
    event("task unloaded", task=name, id=request.state.notes.id)
    return JSONResponse(gone)


def _open(request: Request) -> Service:
    request.state.notes.route = "admin"
    return service_of(request)


def _task(service: Service, name: str, use: TaskUse) -> dict[str, object]:
    source = service.sources.get(name)
    return {
        "name": name, "folder": source.folder if source else None, "virtual_tokens": use.virtual_tokens,
        "bytes": use.nbytes, "tier": use.tier, "storage": use.storage, "priority": use.priority, "pinned": use.pinned,
        "loaded": source.loaded if source else service.began,
    }  # fmt: skip
