"""GET /v1/models: the base model and every task. And the pages that machines look at: health, readiness, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from foreword.serve.http.app_state import service_of
from foreword.serve.http.schemas import Error, Model, ModelList, State
from foreword.serve.http.service import Service

router = APIRouter()


@router.get("/v1/models", response_model=ModelList, tags=["OpenAI"], summary="The base model and every task")
async def list_models(request: Request) -> Response:
    """What ``model`` can be."""
    service = service_of(request)
    request.state.notes.route = "models"
    names = [service.settings.base, *service.library.names]
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in names]})


@router.get("/v1/models/{name:path}", response_model=Model, tags=["OpenAI"], summary="One of them")
async def get_model(request: Request, name: str) -> Response:
    service = service_of(request)
    request.state.notes.route = "models"
    service.task(name)
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> dict[str, object]:
    base = service.settings.base
    source = service.sources.get(name)
    return {
        "id": name, "object": "model", "created": source.loaded if source else service.began, "owned_by": "foreword",
        "parent": None if name == base else base,
    }  # fmt: skip


@router.get("/healthz", response_model=State, tags=["operation"], summary="Whether the process is alive")
async def healthz(request: Request) -> Response:
    request.state.notes.route = "healthz"
    return JSONResponse({"status": "alive"})


@router.get(
    "/readyz", response_model=State, tags=["operation"], summary="Whether requests are taken",
    responses={503: {"model": Error, "description": "Not now"}},
)  # fmt: skip
async def readyz(request: Request) -> Response:
    request.state.notes.route = "readyz"
    ready = service_of(request).engine.accepting
    return JSONResponse({"status": "ready" if ready else "stopping"}, 200 if ready else 503)


@router.get("/metrics", tags=["operation"], summary="Numbers for Prometheus", response_class=Response,
            responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})  # fmt: skip
async def metrics(request: Request) -> Response:
    request.state.notes.route = "metrics"
    return Response(service_of(request).metrics.page(), media_type=CONTENT_TYPE_LATEST)
