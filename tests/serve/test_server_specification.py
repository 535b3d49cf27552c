"""The server against its own OpenAPI document: schemathesis makes requests that fit it, and some that don't."""

from __future__ import annotations

from collections import Counter

import pytest
from servers import ADMIN, KEY, serving

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import CHECKS  # noqa: E402

EXAMPLES = 50
ROUTES = [
    "POST /v1/completions", "POST /v1/chat/completions", "POST /v1/foreword/shares", "GET /v1/models",
    "GET /v1/models/{name}", "GET /healthz", "GET /readyz", "GET /metrics", "GET /admin/prefixes",
    "PUT /admin/prefixes/{name}", "DELETE /admin/prefixes/{name}",
]  # fmt: skip
# A task that isn't there is a request that fits the document; keys have a test of their own.
EXCLUDED = ("positive_data_acceptance", "ignored_auth", "missing_required_header", "use_after_free")


@pytest.fixture(scope="module")
def server():
    with serving(keys=[KEY], admin=[ADMIN], rows=4, chat_tokens=8) as running:
        yield running


@pytest.fixture(scope="module")
def operations(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{op.method.upper()} {op.path}": op for op in found}


def test_the_document_names_every_route(operations):
    assert set(operations) == set(ROUTES)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fits", "does not fit"])
@pytest.mark.parametrize("route", ROUTES)
def test_answers_are_as_the_document_says(operations, server, route, mode):
    excluded = [check for check in CHECKS.get_all() if check.__name__ in EXCLUDED]
    key = ADMIN if "/admin" in route else KEY
    operation, statuses = operations[route], Counter()
    if mode is GenerationMode.NEGATIVE and route.startswith("GET") and "{" not in route:
        pytest.skip("a route without parameters has no malformed ones")

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.generate], database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            case.body.pop("stream", None)  # events are no JSON
            if "shares" in route:
                case.body |= {"model": "long", "prompt": "The film"}
                case.body.pop("messages", None)  # one of the two
            elif "model" in case.body:
                case.body |= {"model": "long", "max_tokens": 3, "n": 2}
                if isinstance(case.body.get("prompt"), str):  # most texts have no letter that the tokenizer knows
                    case.body["prompt"] = "The film"
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {key}"}
        response = case.call(timeout=120)
        case.validate_response(response, excluded_checks=excluded)
        statuses[response.status_code] += 1

    run()
    if mode is GenerationMode.POSITIVE and "{" not in route:
        assert statuses[200] >= 1, statuses
    assert statuses and server.engine.accepting
    assert server.engine.stats.failed == 0, (server.engine.stats, statuses)
