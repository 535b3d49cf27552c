"""`foreword demo`: the main job on the packaged model and reviews."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from foreword.cli._shared import quiet
from foreword.errors import ConfigError


def run(
    out: Annotated[Path, Option(help="Folder for prefixes, results and report.")] = Path("demo-out"),
    steps: Annotated[int, Option(min=2, help="Training steps for each prefix.")] = 60,
    samples: Annotated[int, Option(min=1, help="Texts written from each opening.")] = 8,
    seed: Annotated[int, Option()] = 1,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier demo in --out.")] = False,
) -> None:
    """Train two prefixes on real film reviews, write with them, score what they wrote."""
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ConfigError(
                f"{out} is not empty; pass --overwrite to replace an earlier demo there, or another --out"
            )
        _clear(out)
    quiet()
    from rich.console import Console
    from rich.table import Table

    from foreword.demo.job import Plan, run_demo
    from foreword.demo.report import verdict

    console = Console()
    results = run_demo(out, Plan(steps=steps, samples=samples, seed=seed), console)
    for i, record in enumerate(results.texts["base"][::samples][:3]):
        console.print(f"\n[bold]{record['opening']}[/bold] …")
        for name, texts in results.greedy.items():
            console.print(f"  [cyan]{name}[/cyan]: {' '.join(texts[i].split())}", highlight=False)
    table = Table("writer", "favourable", "mean probability", "perplexity (base model)")
    for name, s in results.summary.items():
        table.add_row(
            name,
            f"{s['favourable']:.0f} of {s['texts']:.0f}",
            f"{s['mean_positive']:.2f}",
            f"{s['perplexity']:.1f}",
        )
    console.print(table)
    console.print(f"classifier, on held-out reviews: {results.classifier['held_out_accuracy']:.1%} right")
    console.print(f"mixed batch: {results.mixed['equal_to_alone']} of {results.mixed['rows']} rows as written alone")
    console.print(verdict(results))
    typer.echo(f"report: {out / 'report.md'}")


def _clear(out: Path) -> None:
    """Remove an earlier demo, and nothing that isn't one."""
    import shutil

    ours = {"positive", "negative", "results.json", "report.md", "curves.png", "sentiment.png"}
    if strange := sorted({p.name for p in out.iterdir()} - ours):
        raise ConfigError(f"{out} holds {strange[0]}, which is not of a demo; choose another --out")
    shutil.rmtree(out)
