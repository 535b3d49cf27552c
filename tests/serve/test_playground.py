"""The page at ``/`` in a real Chromium: what people do there, with keys only, on telephones, against mischief."""

from __future__ import annotations

import math
import re
import time

import browsers
import engines
import httpx
import pytest
import servers
import torch
from engines import alone
from servers import KEY, serving, wait_for

import foreword as fw
import zoo

pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")
if browsers.chromium() is None:
    pytest.skip("no Chromium here: apt-get install chromium, or name one in CHROMIUM", allow_module_level=True)

from playwright.sync_api import expect

TOKENIZER = zoo.tokenizer()
TEXT = "The film is"
WIDTHS = {"desktop": (1280, 900), "telephone": (360, 740)}
expect.set_options(timeout=20_000)


def wanted(held, task, tokens=12, text=TEXT):
    ids = TOKENIZER(text)["input_ids"]
    return TOKENIZER.decode(alone(held, ids, task, tokens), skip_special_tokens=True)


def slowly(held, seconds):
    return held.model.model.layers[0].register_forward_hook(lambda *_: time.sleep(seconds))


@pytest.fixture(scope="module")
def chromium():
    with browsers.browser() as running:
        yield running


@pytest.fixture(scope="module")
def server():
    with serving(rows=8) as running:
        yield running


@pytest.fixture
def visit(chromium):
    """Opens the page of a server; in the end, whatever the page complained of or asked of others is an error."""
    contexts, wrong = [], []

    def opened(running, *, width="desktop", scheme="light", ready=True, excused=(), **options):
        width, height = WIDTHS[width]
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()

        def told(message):
            if message.type in ("error", "warning") and not any(e in message.text for e in excused):
                wrong.append(message.text)

        page.on("console", told)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(running.url) or wrong.append(asked.url))
        page.on("dialog", lambda dialog: (wrong.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(running.url)
        if ready:
            page.locator("#tasks label").first.wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page, *, tasks=("base", "short", "long"), prompt=TEXT, **fields):
    """Fill in what is asked, and write. The fields are ids."""
    for box in page.locator("#tasks input").all():
        box.set_checked(box.get_attribute("data-model") in tasks, force=True)
    page.fill("#prompt", prompt)
    for name, value in {"max-tokens": 12, "temperature": 0, **fields}.items():
        page.fill(f"#{name.replace('_', '-')}", str(value))
    page.click("#go")


def column(page, name):
    return page.locator(".answer").filter(has=page.get_by_role("heading", name=name, exact=True))


def answer(page, name, state="ended"):
    """Its text, when it has come to a state."""
    expect(column(page, name)).to_have_attribute("data-state", state)
    return column(page, name).locator(".written").text_content()


def test_answers_of_several_tasks_stream_side_by_side(server, visit):
    slow = slowly(server.held, 0.03)
    page = visit(server)
    try:
        ask(page, max_tokens=100)
        for name in ("base", "short", "long"):
            expect(column(page, name)).to_have_attribute("data-state", "writing")
        # All at once: each has a beginning of its answer and not the end.
        seen = {n: column(page, n).locator(".written").text_content() for n in ("base", "short", "long")}
        assert all(column(page, n).get_attribute("data-state") == "writing" for n in seen)
        assert server.engine.stats.rows == 3
    finally:
        slow.remove()
    for name, beginning in seen.items():
        want = wanted(server.held, None if name == "base" else name, 100)
        assert answer(page, name) == want and 0 < len(beginning) < len(want) and want.startswith(beginning)
        assert re.search(r"^100 tokens \(limit\) · [\d.]+ tokens/s · first after", column(page, name).inner_text(), re.M)
    boxes = [column(page, n).bounding_box() for n in seen]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    expect(page.get_by_role("status")).to_have_text("Done.")
    texts = page.locator(".text")
    assert [texts.nth(i).get_attribute("aria-live") for i in range(3)] == ["polite"] * 3
    assert [texts.nth(i).get_attribute("aria-busy") for i in range(3)] == ["false"] * 3


def test_tokens_per_second_are_what_they_are(server, visit):
    slow = slowly(server.held, 0.05)
    page = visit(server)
    try:
        ask(page, tasks=["long"], max_tokens=20)
        answer(page, "long")
    finally:
        slow.remove()
    shown = float(re.search(r"([\d.]+) tokens/s", column(page, "long").inner_text())[1])
    assert 1 < shown < 20  # a step takes 1/20 s, and what the machine adds


def test_the_strength_changes_the_answer(server, visit):
    page = visit(server)
    ask(page, tasks=["long"], strength_exact=0)
    assert answer(page, "long") == wanted(server.held, None)
    expect(column(page, "long").locator("figcaption")).to_contain_text("At strength 0")
    page.locator("#strength").focus()
    for _ in range(60):
        page.keyboard.press("ArrowRight")
    assert page.input_value("#strength-exact") == "3"
    page.click("#go")
    expect(column(page, "long").locator(".of")).to_have_text("strength 3")
    body = {"model": "long", "prompt": TEXT, "max_tokens": 12, "temperature": 0, "strength": 3}
    want = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
    assert answer(page, "long") == want and want not in (wanted(server.held, None), wanted(server.held, "long"))


def test_a_seed_gives_the_same_answer_again_and_chats_work(server, visit):
    page = visit(server)
    texts = []
    for seed in (7, 7, 8):
        ask(page, tasks=["short"], temperature=1.5, seed=seed)
        texts.append(answer(page, "short"))
    assert texts[0] == texts[1] != texts[2]
    page.get_by_label("Answer as chat").check()
    ask(page, tasks=["short"], prompt="The film")
    assert answer(page, "short") == wanted(server.held, "short", text="user: The film\nassistant:")


@pytest.mark.parametrize("how", ["the button", "Escape", "leaving"])
def test_stopping_frees_the_rows(server, visit, how):
    slow = slowly(server.held, 0.02)
    page = visit(server)
    stats = server.engine.stats
    try:
        ask(page, max_tokens=110)
        answer(page, "long", "writing")
        wait_for(lambda: stats.rows == 3)
        if how == "leaving":
            page.goto("about:blank")
        else:
            page.click("#stop") if how == "the button" else page.keyboard.press("Escape")
            assert wanted(server.held, "long", 110).startswith(answer(page, "long", "stopped"))
            expect(page.get_by_role("status")).to_have_text("Stopped.")
            expect(page.locator("#stop")).to_be_disabled()
            expect(page.locator("#go")).to_be_enabled()
            expect(column(page, "long").locator("figure")).to_be_visible()  # of what had come
        wait_for(lambda: stats.rows == stats.waiting == stats.reading == 0, 5)
    finally:
        slow.remove()
    assert server.engine.stats.failed == 0


def test_the_keyboard_is_enough(server, visit):
    page = visit(server)
    slow = slowly(server.held, 0.02)
    keys = page.keyboard
    focused = page.locator(":focus")
    expect(page.locator("#prompt")).to_be_focused()
    keys.type(TEXT)
    seen = []
    for _ in range(12):
        keys.press("Tab")
        # Whatever has the focus has a name, and shows that it has it.
        box = focused.bounding_box()
        assert box["width"] > 0
        seen.append(focused.get_attribute("data-model") or focused.get_attribute("id") or focused.get_attribute("name"))
        if seen[-1] == "base":
            keys.press("Space")
            expect(focused).not_to_be_checked()
        elif seen[-1] == "max-tokens":
            keys.press("Control+a")
            keys.type("60")
        elif seen[-1] == "temperature":
            keys.press("Control+a")
            keys.type("0")
        elif seen[-1] == "go":
            break
    tasks = ["base", "short", "middle", "long"]
    assert seen == ["kind", *tasks, "strength", "strength-exact", "max-tokens", "temperature", "seed", "go"]
    keys.press("Enter")
    expect(page.locator("#stop")).to_be_focused()  # which is what there is to do now
    answer(page, "short", "writing")
    keys.press("Enter")
    answer(page, "short", "stopped")
    slow.remove()
    expect(page.locator("#go")).to_be_focused()
    page.locator("#prompt").focus()
    keys.press("Control+Enter")
    assert answer(page, "middle") == wanted(server.held, "middle", 60) and page.locator(".answer").count() == 2
    plot = column(page, "middle").locator("svg")
    expect(plot).to_be_visible()
    for _ in range(20):
        if plot.evaluate("node => node === document.activeElement"):
            break
        keys.press("Tab")
    keys.press("ArrowDown")
    keys.press("End")
    readout = re.compile(r"^layer 1, tokens? .* \(answer\): .* %$")
    expect(column(page, "middle").locator(".readout")).to_have_text(readout)


def test_the_heat_map_is_the_numbers(server, visit):
    page = visit(server)
    ask(page, tasks=["long"], strength_exact=1.5)
    written = answer(page, "long")
    expect(column(page, "long").locator("figure")).to_be_visible()
    prompt, tokens = (TOKENIZER(t)["input_ids"] for t in (TEXT, written))
    model = zoo.build("llama")
    tuning = fw.attach(model, server.held["long"], strength=1.5)
    shares = list(fw.attention_shares(model, input_ids=torch.tensor([prompt + tokens])).values())
    tuning.detach()
    means = [share[0].mean(0) for share in shares]
    cells = page.locator("svg .cell").all()
    length = len(prompt + tokens)
    assert len(cells) == 2 * length < 2 * 48  # a cell for each layer and token
    for cell in cells:
        row, place = int(cell.get_attribute("data-layer")), int(cell.get_attribute("data-column"))
        assert float(cell.get_attribute("fill-opacity")) == pytest.approx(float(means[row][place]), abs=1e-5)
        assert (float(cell.get_attribute("y")), float(cell.get_attribute("x"))) == (row, place)
    averages = [100 * float(m.mean()) for m in means]
    caption = column(page, "long").locator("figcaption").inner_text()
    digits = [float(n) for n in re.findall(r"([\d.]+) %", caption)]
    assert digits == pytest.approx([sum(averages) / 2, max(averages)], abs=0.51)
    assert f"layer {averages.index(max(averages))} " in caption
    for place, part in ((1, "prompt"), (len(prompt), "answer")):
        cells[place].hover()
        readout = f"layer 0, token {place + 1} ({part}): {100 * float(means[0][place]):.0f} %"
        expect(column(page, "long").locator(".readout")).to_have_text(readout)
    assert float(page.locator("svg .border").get_attribute("x1")) == len(prompt)


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
@pytest.mark.parametrize("width", list(WIDTHS))
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
