"""A small search by `foreword tune` on the packaged reviews: the table in docs/training.md.

Six trials of twelve steps show what a search prints, not which configuration is best.

    python benchmarks/search.py [--budget 6] [--steps 12] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from pathlib import Path

from _measure import keep
from methods import TEXT, reviews


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", default="6")
    parser.add_argument("--steps", default="12")
    parser.add_argument("--out", type=Path, help="keep the search here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.out or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for name, part in zip(("train", "valid"), reviews(), strict=True):
            (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        search(work, options)


def search(work: Path, options: argparse.Namespace) -> None:
    """Run the command and keep what it wrote."""
    from foreword.cli import app

    what = ["--budget", options.budget, "--steps", options.steps, "--eval-every", "4", "--max-length", "48",
            "--lengths", "5,10,18", "--inits", "default,random", "--init", TEXT]  # fmt: skip
    files = ["--data", str(work / "train.jsonl"), "--valid", str(work / "valid.jsonl")]
    print("foreword tune --model demo --data train.jsonl --valid valid.jsonl --out runs/search", shlex.join(what))
    app(["tune", "--model", "demo", *files, "--out", str(work / "search"), *what], standalone_mode=False)
    record = json.loads((work / "search" / "trials.json").read_text(encoding="utf-8"))
    chosen = ("length", "init", "reparam", "learning_rate", "outcome", "loss", "seconds", "parameters")
    rows = {str(t["number"]): {k: {**t, **t["config"]}[k] for k in chosen} for t in record["trials"]}
    print("written:", keep("search", {"options": {"budget": options.budget, "steps": options.steps}, "rows": rows}))


if __name__ == "__main__":
    main()
