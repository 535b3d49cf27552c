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
        path = RESULTS / f"compare-{found[1]}.json"
        if not path.is_file():
            return found[0]
        return (
            f"<!-- {found[1]} -->\n{told(found[1], json.loads(path.read_text(encoding='utf-8')))}\n<!-- /{found[1]} -->"
        )

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", block, page, flags=re.DOTALL)


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
