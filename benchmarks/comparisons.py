"""Comparisons into docs/results.md: what `foreword compare` left becomes tables and pictures, and nothing by hand.

    foreword compare ... --out runs/methods                     # as docs/results.md says for each
    python benchmarks/comparisons.py methods=runs/methods [initialisation=runs/initialisation ...]

Writes results/compare-NAME.json (the lines, without each run's own record), docs/images/results-NAME.png, and the
block of docs/results.md between `<!-- NAME -->` and `<!-- /NAME -->`. Without arguments: the blocks anew, from results.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
KEPT = ("preset", "facts", "rows", "failed", "missing_runs")
UNTIMED = ("× time", "writing speed")  # these runs shared the machine with others; benchmarks/step.py has times
PICTURES = ("length", "examples", "steps")  # the first that there is
# What the page begins with: lines of two comparisons each, of film reviews and of E2E.
SUMMARY = {
    "base model": (("reviews", "base model"), ("methods", "base model")),
    "prefix of 20 from a text": (("reviews", "prefix 20"), ("methods", "prefix 20")),
    "prefix of 8 from a text, memory of rank 4": (("reviews", "prefix+memory 8"), ("methods", "prefix+memory 8")),
    "LoRA of rank 4": (("reviews", "lora 4"), ("methods", "lora 4")),
    "BitFit": (("reviews-f32", "bitfit"), ("methods-f32", "bitfit")),
    "full fine-tuning": (("reviews-f32", "full"), ("methods-f32", "full")),
    "prefix of 20 from random numbers": (("reviews-initialisation", "random"), ("initialisation", "random")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("comparisons", nargs="*", help="NAME=FOLDER")
    for given in parser.parse_args().comparisons:
        name, _, folder = given.partition("=")
        keep_comparison(name, Path(folder))
    page = DOCS / "results.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def keep_comparison(name: str, folder: Path) -> None:
    """Take over what is kept of a comparison, and its picture."""
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    about = {k: record["about"][k] for k in ("machine", "parameters")} | {"model": record["about"]["model"]["name"]}
    kept = {"about": about, **{k: record[k] for k in KEPT}}
    path = RESULTS / f"compare-{name}.json"
    path.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    picture = next((p for k in PICTURES if (p := folder / "plots" / f"{k}.png").is_file()), None)
    if picture is not None:
        shutil.copyfile(picture, DOCS / "images" / f"results-{name}.png")


def filled(page: str) -> str:
    """The page with each block made anew from results/."""

    def block(found: re.Match[str]) -> str:
        if not (found[1] == "summary" or (RESULTS / f"compare-{found[1]}.json").is_file()):
            return found[0]
        inside = summary() if found[1] == "summary" else told(found[1], kept(found[1]))
        return f"<!-- {found[1]} -->\n{inside}\n<!-- /{found[1]} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", block, page, flags=re.DOTALL)


def kept(name: str) -> dict[str, Any]:
    """A comparison of results/."""
    record: dict[str, Any] = json.loads((RESULTS / f"compare-{name}.json").read_text(encoding="utf-8"))
    return record


def summary() -> str:
    """The test losses that matter most, the least of each column in bold."""
    from foreword.compare.report import markdown_table

    found = [
        [next(line for line in kept(name)["rows"] if line["label"] == label) for name, label in places]
        for places in SUMMARY.values()
    ]
    losses = [[line["tests"]["test"]["loss"] for line in lines] for lines in found]
    least = [min(column, key=lambda loss: loss["mean"]) for column in zip(*losses, strict=True)]
    rows = [["test loss, nats a token", "trained numbers", "film reviews", "restaurants (E2E)"]]
    for label, lines, own in zip(SUMMARY, found, losses, strict=True):
        cells = [f"{loss['mean']:.3f}" + (f" ± {loss['sd']:.3f}" if loss["sd"] is not None else "") for loss in own]
        bold = [f"**{cell}**" if loss is best else cell for cell, loss, best in zip(cells, own, least, strict=True)]
        rows.append([label, f"{lines[0]['parameters']:,}" if lines[0]["parameters"] else "", *bold])
    return markdown_table(rows)


def without(cells: list[list[str]], columns: tuple[str, ...]) -> list[list[str]]:
    """A table lacking some columns."""
    keep = [i for i, name in enumerate(cells[0]) if name not in columns]
    return [[row[i] for i in keep] for row in cells]


def told(name: str, record: dict[str, Any]) -> str:
    """One comparison in Markdown."""
    from foreword.compare.report import cost, markdown_table, quality, rates
    from foreword.compare.table import best_epoch

    facts = record["facts"]
    lines = [{**line, "best_epoch": best_epoch(line, facts)} for line in record["rows"]]  # older records have none
    tests = list(dict.fromkeys(t for line in lines for t in line["tests"]))
    budget = " ".join(f"{v:g} {k}" for k, v in facts["budget"].items())
    seeds = max(line["runs"] for line in lines)
    parts = ", ".join(f"{v['examples']} {k}" for k, v in facts["task"]["data"].items())
    dtype = facts["model"]["dtype"].removeprefix("torch.")
    blocks = [
        f"{record['about']['model']} in {dtype}, task `{facts['task']['name']}` ({parts} examples), {budget} of "
        f"{facts['batch_size']} a line with the search for a learning rate, {seeds} seed{'s' if seeds > 1 else ''}."
    ]
    for test in tests:
        blocks += [f"**{test}**"] if len(tests) > 1 else []
        blocks.append(markdown_table(quality(lines, test, brief=True)))
    blocks.append(markdown_table(without(cost(lines, brief=True), UNTIMED)))
    if any(line["search"] for line in lines):
        blocks.append(f"<details><summary>Learning rates</summary>\n\n{markdown_table(rates(lines))}\n\n</details>")
    if (DOCS / "images" / f"results-{name}.png").is_file():
        blocks.append(f"![{name}: quality and training](images/results-{name}.png)")
    return "\n\n".join(blocks)


if __name__ == "__main__":
    main()
