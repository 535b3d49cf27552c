"""The playground in a real Chromium; where there is none, the tests that import this are skipped."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager

import pytest
from engines import alone

import zoo

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
WIDTHS = {"desktop": (1280, 900), "telephone": (360, 740)}
TOKENIZER = zoo.tokenizer()
TEXT = "The film is"


def chromium():
    """Where it is; None: nowhere."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (found := shutil.which(name)):
            return found
    return None


pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")
if chromium() is None:
    pytest.skip("no Chromium here: apt-get install chromium, or name one in CHROMIUM", allow_module_level=True)

from playwright.sync_api import expect, sync_playwright  # noqa: E402

expect.set_options(timeout=20_000)


@contextmanager
def browser():
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        try:
            yield running
        finally:
            running.close()


@contextmanager
def visits(running):
    """Opens the page of servers; in the end, whatever a page complained of, or asked of others, is an error."""
    contexts, wrong = [], []

    def visit(server, *, width="desktop", scheme="light", ready=True, excused=(), **options):
        width, height = WIDTHS[width]
        context = running.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()

        def told(message):
            if message.type in ("error", "warning") and not any(e in message.text for e in excused):
                wrong.append(message.text)

        page.on("console", told)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(server.url) or wrong.append(asked.url))
        page.on("dialog", lambda dialog: (wrong.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(server.url)
        if ready:
            page.locator("#tasks label").first.wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def wanted(held, task, tokens=12, text=TEXT):
    """What ``generate`` writes."""
    ids = TOKENIZER(text)["input_ids"]
    return TOKENIZER.decode(alone(held, ids, task, tokens), skip_special_tokens=True)


def slowly(held, seconds):
    """Have the model take its time."""
    return held.model.model.layers[0].register_forward_hook(lambda *_: time.sleep(seconds))


def ask(page, *, tasks=("base", "short", "long"), prompt=TEXT, **fields):
    """Fill in what is asked, and write. The fields are ids."""
    for box in page.locator("#tasks input").all():
        box.set_checked(box.get_attribute("data-model") in tasks, force=True)
    page.fill("#prompt", prompt)
    for name, value in {"max-tokens": 12, "temperature": 0, **fields}.items():
        page.fill(f"#{name.replace('_', '-')}", str(value))
    page.click("#go")


def column(page, name):
    """What a model's answer stands in."""
    return page.locator(".answer").filter(has=page.get_by_role("heading", name=name, exact=True))


def answer(page, name, state="ended"):
    """Its text, when it has come to a state."""
    expect(column(page, name)).to_have_attribute("data-state", state)
    return column(page, name).locator(".written").text_content()
