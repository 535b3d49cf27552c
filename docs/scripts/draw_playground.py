"""Take a picture of the playground, with a real server, prefixes and browser. Writes ``docs/images/playground.png``.

    foreword demo                                             # leaves two prefixes in demo-out
    python docs/scripts/draw_playground.py --prefix positive=demo-out/positive --prefix negative=demo-out/negative

Needs Chromium, and ``pip install playwright``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

OUT = Path(__file__).parents[1] / "images" / "playground.png"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--name", default="SmolLM2-135M", help="what the page calls the base model")
    parser.add_argument("--prefix", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--prompt", default="The acting in this film is")
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    command = [sys.executable, "-m", "foreword", "serve", "--model", asked.model, "--name", asked.name, "--port", "0"]
    with subprocess.Popen([*command, *(part for p in asked.prefix for part in ("--prefix", p))],
                          stderr=subprocess.PIPE, text=True) as server:  # fmt: skip
        try:
            take(url_of(server), asked)
        finally:
            server.terminate()
    print(asked.out)


def url_of(server: subprocess.Popen[str]) -> str:
    """Where it listens, when it does."""
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if '"event": "ready"' in line:
            return str(json.loads(line)["url"])
    raise SystemExit("".join(lines))


def take(url: str, asked: argparse.Namespace) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": asked.width, "height": 900}, color_scheme=asked.scheme,
                                device_scale_factor=2)  # fmt: skip
        page.goto(url)
        boxes = page.locator("#tasks input")
        boxes.first.wait_for()
        page.fill("#prompt", asked.prompt)
        page.fill("#max-tokens", str(asked.max_tokens))
        page.fill("#temperature", "0")
        page.click("#go")
        chosen = page.locator("#tasks input:checked").count()
        page.locator(".answer[data-state=ended]").nth(chosen - 1).wait_for(timeout=600_000)
        page.locator("figure:not([hidden])").nth(chosen - 1).wait_for(timeout=600_000)
        page.locator("h1").click()  # the focus off the button
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=asked.out, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
