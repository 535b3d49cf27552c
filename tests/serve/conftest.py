"""One browser for the tests of a file. (Playwright keeps an event loop in the thread meanwhile.)"""

from __future__ import annotations

import pytest


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
