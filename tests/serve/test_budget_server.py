"""`foreword serve` within a budget: options, what is answered where there is no room, and its numbers."""

from __future__ import annotations

import signal

import engines
import httpx
import pytest
import servers
from servers import ADMIN, Process, serving
from typer.testing import CliRunner

import foreword as fw
import zoo
from foreword.cli import app
from foreword.serve.library import Library
from foreword.serve.shelf import Shelf

TOKEN = sum(s.parameters(1) for s in fw.sites(zoo.build("llama"))) * 4


def built(tokens, when_full, tasks=("short", "middle", "long")):
    held = Library(zoo.build("llama"), budget=fw.Budget(tokens * TOKEN, 0, when_full))
    made = engines.prefixes(zoo.build("llama"))
    for task in tasks:
        held.add(task, made[task])
    return held


def metric(page, name):
    return float(next(line for line in page.splitlines() if line.startswith(name + " ")).rsplit(" ", 1)[1])


def test_tasks_that_take_turns_and_the_numbers_of_it():
    with serving(built(120, "move,queue")) as running:
        for task in ("short", "long", "middle", "short", "long") * 2:
            body = {"model": task, "prompt": "The film", "max_tokens": 6, "temperature": 0}
            assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).status_code == 200
        page = httpx.get(f"{running.url}/metrics").text
        assert metric(page, 'foreword_tier_limit_bytes{tier="device"}') == 120 * TOKEN
        assert 0 < metric(page, 'foreword_tier_bytes{tier="device"}') <= 120 * TOKEN
        assert metric(page, "foreword_prefix_bytes") == 10 * TOKEN and metric(page, "foreword_tasks") == 3
        assert metric(page, "foreword_promised_bytes") >= 0 and metric(page, "foreword_budget_refusals_total") == 0
        assert 'foreword_tier_limit_bytes{tier="file"}' not in page


def test_no_room_is_429_with_a_time_or_400_where_it_never_will_be():
    body = {"prompt": "The film was", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with serving(built(200, "move")) as running:
        answer = httpx.post(f"{running.url}/v1/completions", json=body | {"model": "long", "n": 4}, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_room"
        assert "the budget has" in answer.json()["error"]["message"]
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json=body | {"model": "long", "stream": True}, timeout=60
        ) as first:
            lines = first.iter_lines()
            next(lines)
            answer = httpx.post(f"{running.url}/v1/completions", json=body | {"model": "short"}, timeout=60)
            if answer.status_code != 200:  # the first may have ended already
                assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "no_room"


def test_admin_sees_tiers_and_sets_ranks(tmp_path):
    made = engines.prefixes(zoo.build("llama"))
    for name, prefix in made.items():
        prefix.save(tmp_path / name)
    head = {"Authorization": f"Bearer {ADMIN}"}
    with serving(built(8, "move", ["long"]), shelf=Shelf(tmp_path), admin=[ADMIN]) as running:
        url = f"{running.url}/admin/prefixes"
        new = httpx.put(f"{url}/middle", json={"priority": 3}, headers=head).json()
        assert (new["tier"], new["storage"], new["priority"], new["pinned"]) == ("device", "plain", 3, False)
        again = httpx.put(f"{url}/middle", json={"pinned": True}, headers=head).json()
        assert (again["priority"], again["pinned"]) == (3, True)
        tasks = {t["name"]: t for t in httpx.get(url, headers=head).json()["tasks"]}
        assert tasks["long"]["tier"] == "file" and tasks["long"]["bytes"] == 6 * TOKEN
        refused = httpx.put(f"{url}/wide", json={"folder": "long", "pinned": True}, headers=head)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "no_room"
        assert running.held.names == ["long", "middle"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    zoo.build("llama").save_pretrained(folder / "model")
    servers.tokenizer().save_pretrained(folder / "model")
    for name, prefix in engines.prefixes(zoo.build("llama")).items():
        prefix.save(folder / "prefixes" / name)
    (folder / "texts.txt").write_text("The film was\n\nA review of it\n")
    return folder


def test_the_command(folders, tmp_path):
    options = [
        "--model", folders / "model", "--prefix-dir", folders / "prefixes", "--device-bytes", f"{130 * TOKEN}",
        "--cpu-bytes", "1kB", "--when-full", "shorten,move,queue", "--texts", folders / "texts.txt", "--pin", "short",
        "--priority", "long=2", "--tier-dir", tmp_path / "tiers", "--rows", "2",
    ]  # fmt: skip
    with Process(*options) as running:
        for task in ("short", "middle", "long"):
            body = {"model": task, "prompt": "The film", "max_tokens": 4}
            assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).status_code == 200
        page = httpx.get(f"{running.url}/metrics").text
        assert metric(page, 'foreword_tier_limit_bytes{tier="cpu"}') == 1000
        assert running.end(signal.SIGTERM) == 0
    assert not (tmp_path / "tiers").exists() or not list((tmp_path / "tiers").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-bytes", "lots"], "'lots' is no number of bytes"),
        (["--device-bytes", "0"], "1 or more"),
        (["--when-full", "hope"], "'hope' is none of these"),
        (["--when-full", "shorten,move"], "needs --texts"),
        (["--texts", "TEXTS"], "isn't asked for"),
        (["--when-full", "shorten", "--texts", "nowhere"], "can't be read"),
        (["--pin", "shrt"], "did you mean short"),
        (["--priority", "long=high"], "whole number"),
        (["--priority", "long"], "KEY=VALUE"),
    ],
)
def test_wrong_options_are_told_before_the_model_is_loaded(folders, options, message):
    given = [str(folders / "texts.txt") if o == "TEXTS" else o for o in options]
    command = ["serve", "--model", str(folders / "nothing"), "--prefix-dir", str(folders / "prefixes"), *given]
    result = CliRunner().invoke(app, command)
    said = " ".join((result.output + str(result.exception)).split())
    assert result.exit_code != 0 and message in said, said


def test_a_task_that_no_request_could_read_is_told_at_once(folders):
    command = [
        "serve", "--model", str(folders / "model"), "--prefix", f"long={folders / 'prefixes' / 'long'}",
        "--device-bytes", str(TOKEN),
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    said = " ".join((result.output + str(result.exception)).split())
    assert result.exit_code != 0 and "--prefix long: it takes" in said and "more --device-bytes" in said, said
