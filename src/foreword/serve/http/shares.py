"""POST /v1/foreword/shares: how much of the attention a task's prefix gets, at each layer, over a text."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from foreword.errors import DeadlineError, OverloadedError, StoppedError
from foreword.serve.http.app_state import service_of
from foreword.serve.http.errors import ApiError
from foreword.serve.http.schemas import Shares, SharesRequest
from foreword.serve.http.service import Service
from foreword.serve.http.streams import unless_gone
from foreword.serve.measuring import Measurement

router = APIRouter(tags=["foreword"])


@router.post("/v1/foreword/shares", response_model=Shares, summary="How much of the attention a prefix gets")
async def measure_shares(request: Request, body: SharesRequest) -> Response:
    """The share of each layer's attention that goes to the task's virtual tokens, along a prompt and its answer.

    One text is measured at a time, by parts between the steps of the answers that are being written.
    """
    service, notes = service_of(request), request.state.notes
    notes.route = "shares"
    task = service.task(body.model)
    notes.model = body.model  # known: it is a label of numbers
    prompt, answer = await _tokens(service, body)
    tokens, engine = prompt + answer, service.engine
    measurement = Measurement(
        service.library, task, body.strength, tokens, output_from=len(prompt), step_tokens=engine.limits.step_tokens,
        column_bytes=engine.column_bytes,
    )  # fmt: skip
    try:
        measured = await unless_gone(request.receive, _measured(service, measurement))
    finally:
        _close(service, measurement)
    service.metrics.tokens.labels(body.model, "measured").inc(len(tokens))
    notes.fields |= {"measured_tokens": len(tokens)}
    edges = _edges(len(tokens), body.columns)
    return JSONResponse({
        "object": "foreword.shares", "model": body.model, "strength": body.strength,
        "virtual_tokens": measurement.virtual_tokens,
        "prompt_tokens": len(prompt), "tokens": len(tokens), "edges": edges,
        "layers": [
            {"site": site, "share": _means(share, edges), "mean": _means(share, [0, len(tokens)])[0]}
            for site, share in measured.items()
        ],
    })  # fmt: skip


async def _tokens(service: Service, body: SharesRequest) -> tuple[list[int], list[int]]:
    """The prompt's and the answer's."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "expected either a prompt or messages", param="prompt")
    if body.messages is not None:
        prompt = await service.chat_prompt([m.plain() for m in body.messages])
    else:
        prompt = (await service.encode([body.prompt or ""]))[0]
    answer = (await service.encode([body.answer], plain=False))[0] if body.answer else []
    if not prompt:
        raise ApiError(400, "the prompt has no token; write at least one word", param="prompt")
    if len(prompt) + len(answer) > service.engine.length:
        raise ApiError(
            400, f"the prompt and the answer have {len(prompt) + len(answer)} tokens; at most {service.engine.length} "
            "fit", code="context_length_exceeded", param="answer" if answer else "prompt",
        )  # fmt: skip
    return prompt, answer


async def _measured(service: Service, measurement: Measurement) -> dict[str, Tensor]:
    """In its turn, a part between two steps of the engine each time.

    Raises:
        OverloadedError: as many wait as may.
        BudgetError: there is no room for it.
        DeadlineError: it took too long, its turn included.
    """
    turns, seconds = service.measuring, service.settings.seconds
    if turns.waiting >= service.engine.limits.queue:
        raise OverloadedError(f"{turns.waiting} texts wait to be measured, which is the most", retry_after=1)
    turns.waiting += 1
    try:
        async with asyncio.timeout(seconds), turns.lock:
            while not await asyncio.wrap_future(service.engine.between_steps(measurement.go_on)):
                pass
    except TimeoutError:
        raise DeadlineError(f"not measured within {seconds:g} s; try again later") from None
    finally:
        turns.waiting -= 1
    return measurement.shares


def _close(service: Service, measurement: Measurement) -> None:
    """Where no pass of it can be under way."""
    try:
        service.engine.between_steps(measurement.close)
    except StoppedError:
        measurement.close()


def _edges(tokens: int, columns: int) -> list[int]:
    """Where at most so many columns begin, as equal as can be, and where the last ends."""
    columns = min(columns, tokens)
    return [i * tokens // columns for i in range(columns + 1)]


def _means(share: Tensor, edges: list[int]) -> list[float | None]:
    """Of each column; None where there is no share (a gate keeps the softmaxes apart)."""
    means = (float(share[a:b].mean()) for a, b in pairwise(edges))
    return [round(m, 6) if m == m else None for m in means]
