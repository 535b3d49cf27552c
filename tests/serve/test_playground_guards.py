"""The page at ``/`` in a real Chromium: against mischief, where something goes wrong, and how it can be read."""

from __future__ import annotations

import math
import re

import browsers
import engines
import httpx
import pytest
import servers
from browsers import TEXT, answer, ask, column, slowly, wanted
from playwright.sync_api import expect
from servers import KEY, serving

import zoo


@pytest.fixture(scope="module")
def server():
    with serving(rows=8) as running:
        yield running


# ---------------------------------------------------------------- mischief

HOSTILE = '<img src=x onerror="alert(1)">'


def hostile_tokenizer():
    """A tokenizer whose every token is markup."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"<script>alert({i})</script>{HOSTILE}": i for i in range(zoo.VOCAB)}
    made = Tokenizer(models.WordLevel({"The": 0, **{w: i for w, i in words.items() if i}}, unk_token="The"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="The", clean_up_tokenization_spaces=False)


def test_names_and_answers_with_markup_are_text(visit, monkeypatch):
    monkeypatch.setattr(servers, "tokenizer", hostile_tokenizer)
    held = engines.library()
    name = f"</h2>{HOSTILE}"
    held.add(name, held["long"])
    with serving(held) as running:
        page = visit(running, excused=["404"])
        assert page.locator("#tasks label").last.text_content() == name
        ask(page, tasks=[name], prompt=f"The {HOSTILE}", max_tokens=5)
        assert page.locator(".answer h2").text_content() == name
        written = answer(page, name)
        body = {"model": name, "prompt": f"The {HOSTILE}", "max_tokens": 5, "temperature": 0}
        assert written == httpx.post(f"{running.url}/v1/completions", json=body).json()["choices"][0]["text"]
        assert written.count(HOSTILE) >= 4
        page.locator("figure").wait_for()
        assert page.locator("img").count() == page.locator("#answers script").count() == 0
        # An error that repeats a hostile name is text as well: the task goes, and the page doesn't know.
        running.service.library.remove(name)
        page.click("#go")
        answer(page, name, "failed")
        expect(page.locator(".problem")).to_contain_text(HOSTILE)
        expect(page.locator(f"[data-model='{name}']")).to_have_count(0)
        assert page.locator("img").count() == 0


def test_the_page_allows_nothing_from_elsewhere(server, visit):
    got = httpx.get(server.url)
    policy = got.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'") and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy and got.headers["x-content-type-options"] == "nosniff"
    names = set(re.findall(r'(?:src|href)="([^"]+)"', got.text))
    assert names == {"playground/icon.svg", "playground/style.css", "playground/app.js"}
    assert not re.search(r"\son\w+=|<style|style=|javascript:|https?://", got.text)
    for name in (*names, "playground/api.js", "playground/column.js", "playground/heatmap.js"):
        part = httpx.get(f"{server.url}/{name}")
        assert part.status_code == 200 and part.headers["content-security-policy"] == policy
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", part.text)
        again = httpx.get(f"{server.url}/{name}", headers={"if-none-match": part.headers["etag"]})
        assert again.status_code == 304 and again.content == b""
    for name in ("index.html", "..%2fapp.py", "%2e%2e/app.py", "nothing", ".", "app.py"):
        assert httpx.get(f"{server.url}/playground/{name}").status_code == 404
    assert httpx.head(server.url).status_code == 200 and httpx.post(server.url).status_code == 405
    # The policy is at work: an inline script that is added doesn't run.
    page = visit(server, excused=["Content Security Policy", "TrustedScript"])
    page.evaluate("""() => { const s = document.createElement("script");
                            try { s.textContent = "document.title = 'run'"; document.head.append(s); } catch {} }""")
    assert page.title() == "foreword: playground"


def test_without_a_playground_there_is_no_page():
    with serving(playground=False) as running:
        paths = ("/", "/playground/app.js", "/healthz")
        assert [httpx.get(running.url + path).status_code for path in paths] == [404, 404, 200]


# ---------------------------------------------------------------- what goes wrong


def test_a_key_is_asked_for_and_kept_in_the_tab(visit):
    refused = ["401 (Unauthorized)"]
    with serving(keys=[KEY]) as running:
        page = visit(running, ready=False, excused=refused)
        expect(page.get_by_label("API key")).to_be_focused()
        expect(page.get_by_role("status")).to_have_text("This server asks for an API key. Enter one above.")
        page.keyboard.type("not-the-key-of-the-tests")
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_contain_text("doesn’t take this key")
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        page.locator("#tasks label").first.wait_for()
        expect(page.get_by_label("API key")).to_be_hidden()
        expect(page.locator("#prompt")).to_be_focused()
        ask(page, tasks=["long"])
        assert answer(page, "long") == wanted(running.held, "long")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.reload()
        page.locator("#tasks label").first.wait_for()  # the tab remembers
        other = visit(running, ready=False, excused=refused)
        expect(other.get_by_label("API key")).to_be_visible()


def test_a_full_queue_is_said_in_words(visit):
    with serving(rows=1, queue=1) as running:
        slow = slowly(running.held, 0.15)
        body = {"model": "long", "prompt": TEXT, "max_tokens": 100, "stream": True}
        with (
            httpx.Client(base_url=running.url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=body) as first,
        ):
            events = first.iter_bytes()  # as long as it is held, the stream is open
            next(events)
            page = visit(running, excused=["429"])
            ask(page, tasks=["short", "long", "middle"])
            expect(page.locator("[data-state=failed]").nth(1)).to_be_visible()
            said = page.locator(".problem:not([hidden])").first.inner_text()
            assert re.fullmatch(r"The server is busy and its queue is full\. Try again in \d+ s\.", said)
            slow.remove()
        expect(page.locator("[data-state=ended]")).to_have_count(1)
        expect(page.get_by_role("status")).to_contain_text("2 of 3 answers failed")


def test_a_server_that_goes_away_is_said_in_words(visit):
    with serving(drain=1) as running:
        slow = slowly(running.held, 0.05)
        page = visit(running, excused=["ERR_"])
        ask(page, tasks=["long"], max_tokens=100)
        answer(page, "long", "writing")
        running.engine.stop()
        answer(page, "long", "failed")
        expect(page.locator(".problem")).to_contain_text("shutting down")
        assert len(column(page, "long").locator(".written").text_content()) > 0  # what had come is still there
        slow.remove()
    page.click("#go")
    answer(page, "long", "failed")
    expect(page.get_by_role("status")).to_contain_text("can’t be reached")


def test_what_the_server_refuses_is_said_and_nothing_is_sent_that_makes_no_sense(server, visit):
    page = visit(server, excused=["400"])
    ask(page, tasks=["long"], max_tokens=500)
    answer(page, "long", "failed")
    expect(page.locator(".problem")).to_have_text(re.compile("^The prompt has .* together at most 128 fit\\.$"))
    ask(page, tasks=[])
    expect(page.get_by_role("status")).to_have_text("Choose at least one task, or the base model.")
    before = server.engine.stats.requests
    for change in ({"max_tokens": 0}, {"temperature": -1}, {"strength_exact": ""}, {"seed": 1.5}, {"prompt": ""}):
        page.fill("#seed", "")
        page.fill("#strength-exact", "1")
        ask(page, tasks=["long"], **change)
        assert page.locator(":invalid").count() > 0
    assert server.engine.stats.requests == before


def test_many_tasks_can_be_found_and_no_more_run_than_can(visit):
    held = engines.library()
    for number in range(200):
        held.add(f"task-{number}", held["short"])
    with serving(held) as running:
        page = visit(running)
        page.fill("#filter", "task-19")
        names = [label.text_content() for label in page.locator("#tasks label:visible").all()]
        assert set(names) == {"base", "short", "middle"} | {"task-19"} | {f"task-19{i}" for i in range(10)}
        for number in range(190, 193):
            page.locator(f"[data-model='task-{number}']").check(force=True)
        expect(page.locator("[data-model='task-195']")).to_be_disabled()
        expect(page.locator("#tasks-hint")).to_contain_text("Six at once is the most")
        page.locator("[data-model='task-190']").uncheck(force=True)
        expect(page.locator("[data-model='task-195']")).to_be_enabled()


# ---------------------------------------------------------------- how it looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", list(browsers.WIDTHS))
def test_it_can_be_read_at_two_widths_in_light_and_dark(server, visit, width, scheme):
    page = visit(server, width=width, scheme=scheme)
    ask(page, max_tokens=30)
    answer(page, "long")
    page.locator("figure:not([hidden])").nth(2).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    tops = [page.locator(".answer").nth(i).bounding_box()["y"] for i in range(3)]
    assert len(set(tops)) == (1 if width == "desktop" else 3)
    for name in ("h1", "label", ".hint", ".text .written", ".text .prompt", ".numbers", "figcaption", "#go", ".of"):
        ratio = contrast(page, name)
        assert ratio >= 4.5, f"{name}: {ratio:.2f}"
    for button in page.locator("button:visible, #tasks label").all():
        assert button.bounding_box()["height"] >= 28


def test_nothing_moves_for_those_who_prefer_that(server, visit):
    slow = slowly(server.held, 0.03)
    try:
        for motion, name in (("no-preference", "blink"), ("reduce", "none")):
            page = visit(server, reduced_motion=motion)
            ask(page, tasks=["long"], max_tokens=100)
            answer(page, "long", "writing")
            shown = "node => getComputedStyle(node, '::after').animationName"
            assert page.locator(".answer .text").evaluate(shown) == name
            page.keyboard.press("Escape")
            answer(page, "long", "stopped")
    finally:
        slow.remove()


def contrast(page, selector):
    """WCAG's ratio of a text's colour to what lies behind it."""
    found = page.locator(selector).first.evaluate(
        """node => { const text = getComputedStyle(node).color; let back;
             do { back = getComputedStyle(node).backgroundColor; node = node.parentElement; }
             while (node && back === "rgba(0, 0, 0, 0)"); return [text, back]; }"""
    )
    lights = sorted(_light(colour) for colour in found)
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _light(colour):
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.03928 else math.pow((p + 0.055) / 1.055, 2.4) for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
