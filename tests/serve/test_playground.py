"""The page at ``/`` in a real Chromium: what people do there, with a mouse or with keys only."""

from __future__ import annotations

import re

import httpx
import pytest
import torch
from browsers import TEXT, TOKENIZER, answer, ask, column, slowly, wanted
from playwright.sync_api import expect
from servers import serving, wait_for

import foreword as fw
import zoo


@pytest.fixture(scope="module")
def server():
    with serving(rows=8) as running:
        yield running


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
        numbers = column(page, name).locator(".numbers")
        expect(numbers).to_have_text(re.compile(r"^100 tokens \(limit\) · [\d.]+ tokens/s · first after [\d.]+ s$"))
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
    assert 1 < shown < 40  # a step takes 1/20 s and what the machine adds; a first piece that comes late makes it more


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
