"""What `foreword eval` shows people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from foreword.cli._shared import print_json

# Below so many examples the bootstrap takes the ones that happen to be there for all there are.
_FEW = 30


def show(record: dict[str, Any], out: Path | None) -> None:
    """The metrics of an evaluation, with intervals, and beside another run where it was compared."""
    from rich.console import Console
    from rich.table import Column, Table

    compared = record["against"] is not None
    more = ("less the other", "p") if compared else ()
    table = Table(*(Column(c, no_wrap=True) for c in ("metric", "value", "95 % interval", *more)))
    for name, m in record["metrics"].items():
        row = [name, _number(m["value"], m["unit"]), _range(m)]
        if compared:
            d = m["against"]
            row += [f"{d['difference']:+.2f}", "" if d["p"] is None else f"{d['p']:.3f}"]
        table.add_row(*row)
    console = Console()
    console.print(f"{record['examples']} examples of {record['data']}", highlight=False, markup=False)
    console.print(table)
    for name, m in record["metrics"].items():
        if m["note"]:
            console.print(f"{name}: {m['note']}", style="dim", highlight=False, markup=False)
    if compared and record["examples"] < _FEW:
        console.print(f"with {record['examples']} examples the p-values say little", highlight=False)
    if out is not None:
        typer.echo(f"written: {out}")


def show_harness(record: dict[str, Any]) -> None:
    """The results of tasks of lm-evaluation-harness."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "value", "standard error")
    for name, found in record["tasks"].items():
        for metric, v in found.items():
            table.add_row(name, metric, f"{v['value']:.4f}", "" if v["stderr"] is None else f"{v['stderr']:.4f}")
    Console().print(table)


def show_metrics(as_json: bool) -> None:
    """The metrics that there are, and the kinds of task."""
    from foreword.evaluate.metrics import METRICS, TASKS

    if as_json:
        rows = {m.name: {"what": m.what, "needs": m.needs, "higher_is_better": m.higher} for m in METRICS.values()}
        print_json({"metrics": rows, "tasks": TASKS})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "what", "needs", "better")
    for m in METRICS.values():
        table.add_row(m.name, m.what, ", ".join(m.needs), "more" if m.higher else "less")
    console = Console()
    console.print(table)
    for name, of in TASKS.items():
        console.print(f"--task {name}: {', '.join(of)}", highlight=False)


def _number(value: float | None, unit: str) -> str:
    return "not defined" if value is None else f"{value:.2f}{' %' if unit == '%' else ''}"


def _range(record: dict[str, Any]) -> str:
    if record["low"] is None or record["high"] is None:
        return ""
    return f"{record['low']:.2f} to {record['high']:.2f}"
