"""`foreword compare`: methods under one budget on one task, with tables, plots and a report."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from foreword.cli._shared import print_json, quiet
from foreword.errors import ConfigError, ForewordError

if TYPE_CHECKING:
    from foreword.compare.comparison import Comparison

_TASK, _BUDGET, _RUN = "Task", "Budget and learning rates", "Run"


def run(
    model: Annotated[str | None, Option(help="Base model: hub name, folder, .gguf file, or 'demo' (the packaged SmolLM2).")] = None,
    task: Annotated[str | None, Option(help="reviews or sentiment (packaged film reviews), e2e (with --data-dir), or a .yaml file.", show_default="reviews, or the preset's")] = None,
    out: Annotated[Path | None, Option(help="Folder for the comparison.")] = None,
    methods: Annotated[str | None, Option(help="With commas, lora:4 with a size; --list shows all.", show_default="all")] = None,
    lengths: Annotated[str | None, Option(help="Virtual tokens, with commas; each is a line of every method that has them.", show_default="20")] = None,
    preset: Annotated[str | None, Option(help="Lines that the literature compares: length, reparameterisation, placement, layers, initialisation, low-data, extrapolation, methods.")] = None,
    seeds: Annotated[int, Option(min=1, help="How many.")] = 3,
    budget: Annotated[str, Option(help="Of each line: steps (200), or time in training steps (300s, 10m).", rich_help_panel=_BUDGET)] = "200",
    rates: Annotated[str, Option(help="Learning rates to choose among, as multiples of each method's usual one; 1: that one.", rich_help_panel=_BUDGET)] = "0.3,1,3",
    rate_share: Annotated[float, Option(help="Share of the budget for choosing.", rich_help_panel=_BUDGET)] = 0.25,
    data_dir: Annotated[Path | None, Option(help="Folder of the E2E data.", rich_help_panel=_TASK)] = None,
    without: Annotated[str | None, Option(help="Slot of E2E's tables that preset extrapolation leaves out of training.", rich_help_panel=_TASK, show_default="area")] = None,
    metrics: Annotated[str | None, Option(help="With commas, instead of the task's; none: likelihood only.", rich_help_panel=_TASK, show_default="the task's")] = None,
    init: Annotated[str | None, Option(help="Text about the task, which prefixes and prompts start from.", rich_help_panel=_TASK, show_default="the task's")] = None,
    max_length: Annotated[int | None, Option(min=2, help="Longest example in tokens; longer inputs are cut.", rich_help_panel=_TASK, show_default="the task's")] = None,
    beams: Annotated[int | None, Option(min=1, help="Width of beam search (the paper: 5); 1: greedy.", rich_help_panel=_TASK, show_default="the task's")] = None,
    train_limit: Annotated[int, Option(min=0, help="The most examples to train on; 0: all.", rich_help_panel=_TASK)] = 5000,
    valid_limit: Annotated[int, Option(min=0, help="To validate on; 0: all.", rich_help_panel=_TASK)] = 128,
    test_limit: Annotated[int, Option(min=0, help="To test on; 0: all.", rich_help_panel=_TASK)] = 128,
    batch_size: Annotated[int, Option(min=1, help="Examples a step.", rich_help_panel=_RUN)] = 8,
    looks: Annotated[int, Option(min=1, help="Validations of a run.", rich_help_panel=_RUN)] = 8,
    keep: Annotated[str | None, Option(help="What is tested of a run: its last state, or the one of the best validation.", rich_help_panel=_RUN, show_default="last; best with preset low-data")] = None,
    intervals: Annotated[int, Option(min=0, help="Bootstrap resamples for 95 % intervals; 0: none.", rich_help_panel=_RUN)] = 1000,
    prompted: Annotated[bool, Option(help="A line for the base model with the task's text before the input.", rich_help_panel=_RUN)] = True,
    speed: Annotated[bool, Option(help="Measure how fast each writes (with the first seed).", rich_help_panel=_RUN)] = True,
    dtype: Annotated[str | None, Option(help="Of the base model: float32, bfloat16, …", rich_help_panel=_RUN)] = None,
    attn: Annotated[str | None, Option(help="Attention implementation of the base model.", rich_help_panel=_RUN)] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the comparison in --out; more methods, lengths or seeds may be added.", rich_help_panel=_RUN)] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show the runs and about how long they take, after a few measured steps; nothing is written.", rich_help_panel=_RUN)] = False,
    list_all: Annotated[bool, Option("--list", help="Show the methods and presets and stop.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print results.json.")] = False,
) -> None:  # fmt: skip
    """Compare methods on a task under the same budget: quality, memory, time, parameters, over several seeds."""
    from foreword.cli import _compare_shown as shown

    if list_all:
        shown.show_known(as_json)
        return
    if model is None or (out is None and not dry_run):
        raise ConfigError("give --model (e.g. demo) and --out, a folder for the comparison")
    quiet()
    from foreword.compare.budget import Budget, parse_factors
    from foreword.compare.comparison import Comparison
    from foreword.compare.folder import Folder
    from foreword.compare.plan import Plan
    from foreword.compare.presets import known_preset
    from foreword.compare.settings import Settings

    allowed, factors = Budget.parse(budget), parse_factors(rates)
    if out is not None and not dry_run:
        Folder(out).require(resume=resume)
    kept: Any = keep or (known_preset(preset).keep if preset is not None else "last")
    settings = Settings(model, dtype, attn, batch_size, looks, intervals, kept)
    limits = {"train": train_limit or None, "valid": valid_limit or None, "test": test_limit or None}
    changes = {
        "metrics": None if metrics is None else _names(metrics, none=True), "init": init, "max_length": max_length,
        "decoding": None if beams is None else {"beams": beams},
    }  # fmt: skip
    data = _task(task, preset, data_dir, without, limits, changes)
    rows = _rows(preset, data, _names(methods), _numbers(lengths), settings)
    plan = Plan(rows, range(seeds), allowed, factors, rate_share, prompted, speed)
    comparison = Comparison(settings, data, plan, preset)
    if dry_run:
        shown.show_plan(comparison, as_json)
        return
    assert out is not None
    _compare(comparison, out, resume, as_json)


def _compare(comparison: Comparison, out: Path, resume: bool, as_json: bool) -> None:
    from rich.console import Console

    from foreword.cli import _compare_shown as shown

    try:
        with shown.Bars(Console(stderr=True)) as bars:
            outcome = comparison.run(out, resume=resume, watcher=bars)
    except KeyboardInterrupt:
        if (out / "comparison.json").exists():
            typer.echo(f"interrupted; what is finished is in {out}; go on with --resume", err=True)
        raise
    if as_json:
        print_json(outcome.record)
    else:
        shown.show(outcome)
    if outcome.failed:
        raise ForewordError(
            f"{len(outcome.failed)} runs came to nothing, the first: {outcome.failed[0]}. What is finished is in {out}; "
            "--resume tries them again"
        )


def _task(
    name: str | None, preset: str | None, data_dir: Path | None, without: str | None, limits: dict[str, int | None],
    changes: dict[str, Any],
) -> Any:  # fmt: skip
    from dataclasses import replace

    from foreword.compare.presets import known_preset
    from foreword.compare.tasks import Limits, load_task, other_reviews, without_slot

    name = name or (known_preset(preset).task if preset is not None else "reviews")
    parted = preset == "extrapolation" and name != "reviews"  # then there are enough of each part
    read = Limits(None, None, None) if parted else Limits(**limits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = load_task(name, data_dir=data_dir, limits=read, changes=changes)
    for line in dict.fromkeys(str(w.message) for w in caught):
        typer.echo(f"data: {line}", err=True)
    if without is not None and preset != "extrapolation":
        raise ConfigError("--without says what preset extrapolation leaves out; give --preset extrapolation")
    if preset != "extrapolation":
        return found
    if name == "reviews":
        other = other_reviews(Limits(**limits))
        return replace(found, name=other.name, tests=other.tests, note=f"{found.note} {other.note}")
    if without is None and name != "e2e":
        raise ConfigError(
            f"preset extrapolation leaves a slot of tables out of training (name[...] in the inputs), and for the task "
            f"{name} none is named; give --without SLOT, or another preset"
        )
    return without_slot(found, without or "area", Limits(**limits))


def _rows(preset: str | None, data: Any, methods: list[str], lengths: list[int], settings: Any) -> Any:
    from foreword.compare.presets import preset_rows
    from foreword.compare.rows import USUAL, make_rows

    if preset is None:
        return make_rows(methods or USUAL, lengths or [20], data)
    from foreword.compare import process

    layers = process.call("probing:layers", settings) if preset == "layers" else 0
    return preset_rows(preset, data, methods=methods, lengths=lengths, layers=layers)


def _names(text: str | None, *, none: bool = False) -> list[str]:
    found = [n.strip() for n in (text or "").split(",") if n.strip()]
    if none and found == ["none"]:
        return []
    if text is not None and not found:
        raise ConfigError(f"{text!r} names nothing; expected names with commas")
    return found


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(n) for n in text.split(",")] if text is not None else []
    except ValueError:
        raise ConfigError(f"--lengths {text!r}; expected whole numbers with commas, e.g. 5,10,20") from None
