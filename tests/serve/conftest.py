"""A library with a budget, and one browser for the tests of a file (Playwright keeps an event loop in the thread
meanwhile)."""

from __future__ import annotations

import pytest
from small_tasks import TOKEN

import foreword as fw
import zoo
from foreword.serve.library import Library


@pytest.fixture
def library():
    """Makes libraries of a small model; budgets in tokens."""
    made = []

    def build(tokens=None, cpu=None, when_full="move,queue,refuse", **options):
        device = None if tokens is None else tokens * TOKEN
        held = Library(
            zoo.build("llama"), budget=fw.Budget(device, None if cpu is None else cpu * TOKEN, when_full, **options)
        )
        made.append(held)
        return held

    yield build
    for held in made:
        held.detach()


@pytest.fixture(scope="module")
def chromium():
    import browsers

    with browsers.browser() as running:
        yield running


@pytest.fixture
def visit(chromium):
    """Opens the page of a server: ``visit(server)``."""
    import browsers

    with browsers.visits(chromium) as opened:
        yield opened
