"""What `foreword compare` shows people: bars while it runs, tables at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from foreword.cli._shared import print_json
from foreword.compare.comparison import Comparison, Outcome, Watcher
from foreword.compare.estimate import estimate
from foreword.compare.presets import PRESETS
from foreword.compare.report import cost, edge_note, quality
from foreword.compare.rows import METHODS

if TYPE_CHECKING:
    from foreword.compare.plan import Result, Run

__all__ = ["Bars", "show", "show_known", "show_plan"]


class Bars(Watcher):
    """Two bars: the runs, and what the present one is at."""

    def __init__(self, console: Console) -> None:
        self.console = console
        name, said = TextColumn("{task.description}"), TextColumn("{task.fields[said]}")
        self.bar = Progress(name, BarColumn(), MofNCompleteColumn(), said, TimeElapsedColumn(), console=console)
        self._runs = self.bar.add_task("runs", total=None, said="looking at data and methods …")
        self._one = self.bar.add_task("", total=100, said="", visible=False)

    def __enter__(self) -> Bars:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def checking(self, label: str) -> None:
        self.bar.update(self._runs, said=f"looking at {label}")

    def planned(self, total: int, done: int) -> None:
        self.bar.update(self._runs, total=total, completed=done, said=f"{done} finished before" if done else "")

    def begun(self, run: Run) -> None:
        self.bar.reset(self._one, total=100, description=run.describe(), said="loading", visible=True)

    def told(self, run: Run, what: Mapping[str, Any]) -> None:
        if "testing" in what:
            self.bar.update(self._one, completed=100, said=f"testing: {what['testing']}")
        elif "valid" in what:
            self.bar.update(self._one, said=f"step {what['step']}, validation {what['valid']:.3f}")
        elif "done" in what:
            self.bar.update(self._one, completed=round(100 * what["done"]))

    def finished(self, run: Run, result: Result) -> None:
        self.bar.advance(self._runs)
        loss = f"validation {result['valid_loss']:.3f}" if result["valid_loss"] is not None else result["message"]
        self.bar.update(self._runs, said="")
        self.console.print(f"{run.describe()}: {loss}", highlight=False, markup=False)

    def failed(self, run: Run, message: str) -> None:
        self.console.print(f"{run.describe()}: {message}", style="red", highlight=False, markup=False)


def show(outcome: Outcome) -> None:
    """The tables, and where the files are."""
    console = Console()
    lines = outcome.record["rows"]
    for test in dict.fromkeys(t for line in lines for t in line["tests"]):
        _print_table(console, quality(lines, test, brief=True), test)
    _print_table(console, cost(lines, brief=True), "cost")
    if edge := edge_note(lines):
        console.print(edge, highlight=False, markup=False)
    if outcome.missing:
        console.print(f"{outcome.missing} runs are not finished", highlight=False)
    typer.echo(f"written: {', '.join(str(p) for p in outcome.written[:3])} and plots in {outcome.out / 'plots'}")


def _print_table(console: Console, cells: Sequence[Sequence[str]], title: str | None) -> None:
    """A table; columns that have no room beside the lines' names stand in another one below, with the names again."""
    names, *columns = zip(*cells, strict=True)
    boundless = console.options.update(width=10_000)  # a table is measured as it would like to be
    while columns:
        some = (_table(names, columns[:n], title) for n in range(len(columns), 0, -1))
        table = next((t for t in some if console.measure(t, options=boundless).maximum <= console.width), None)
        table = table or _table(names, columns[:1], title)
        console.print(table)
        columns, title = columns[len(table.columns) - 1 :], None


def _table(names: Sequence[str], columns: Sequence[Sequence[str]], title: str | None) -> Table:
    table = Table(title=title)
    for i, (head, *_) in enumerate((names, *columns)):
        table.add_column(head.replace(" ", "\n", 1) if len(head) > 6 else head, justify="right" if i else "left")
    for row in zip(names[1:], *(column[1:] for column in columns), strict=True):
        table.add_row(*row)
    return table


def show_plan(comparison: Comparison, as_json: bool) -> None:
    """The runs, and about how long they take."""
    console = Console(stderr=True)
    with console.status("measuring a step of each line …") as status:
        comparison.probe()
        found = estimate(comparison, lambda label: status.update(f"measuring {label} …"))
    if as_json:
        print_json(found)
        return
    table = Table("line", "runs", "s a step", "s in all", title=f"{found['runs']} runs")
    for line in found["lines"]:
        step = f"{line['seconds_a_step']:.2f}" if line["seconds_a_step"] is not None else ""
        table.add_row(line["label"], str(line["runs"]), step, f"{line['seconds']:.0f}")
    shown = Console()
    shown.print(table)
    shown.print(
        f"about {found['seconds'] / 60:.0f} minutes in all on this machine as it is now: training "
        f"{found['training_seconds'] / 60:.0f}, the rest loading, validating and testing",
        highlight=False,
    )


def show_known(as_json: bool) -> None:
    """The methods and presets that there are."""
    if as_json:
        methods = {name: {"what": m.what, "size": m.size} for name, m in METHODS.items()}
        print_json({"methods": methods, "presets": {n: {"what": p.what, "task": p.task} for n, p in PRESETS.items()}})
        return
    console = Console()
    table = Table("method", "what", "size")
    for name, method in METHODS.items():
        table.add_row(name, method.what, method.size or "")
    console.print(table)
    table = Table("preset", "what", "task")
    for name, preset in PRESETS.items():
        table.add_row(name, preset.what, preset.task)
    console.print(table)
