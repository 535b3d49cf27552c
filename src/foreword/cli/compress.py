"""`foreword compress`: a trained prefix in fewer bytes, at a loss that is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from foreword.cli._data import ChatOption, Source, Turns, TurnsOption
from foreword.cli._shared import load_base, print_json, quiet
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from foreword.compression import Compression
    from foreword.prefix import Prefix

_LIMITS, _DATA, _RUN = "Limits", "Data", "Run"


def run(
    folder: Annotated[Path, Argument(help="Folder of a saved prefix.")],
    data: Annotated[list[str], Option(help="Examples, as for train: shares of attention are measured on them, and distill trains on them.")],
    out: Annotated[Path | None, Option(help="Folder for the smaller prefix.")] = None,
    target_bytes: Annotated[int | None, Option(help="What prefix.safetensors may take: the plan of the least loss.", rich_help_panel=_LIMITS)] = None,
    max_loss_increase: Annotated[float | None, Option(help="What the loss may rise by, in nats a token; alone: the smallest plan.", rich_help_panel=_LIMITS)] = None,
    methods: Annotated[str, Option(help="What is tried, with commas: half, int8, int4, prune, merge, low-rank, distill (trains, minutes).", rich_help_panel=_LIMITS)] = "half,int8,int4,prune,merge,low-rank",
    model: Annotated[str | None, Option(help="Base model, as for train.", show_default="the one that the prefix names")] = None,
    valid: Annotated[list[str] | None, Option(help="Held-out examples, which plans are judged by.", rich_help_panel=_DATA)] = None,
    valid_share: Annotated[float | None, Option(help="Hold this share of --data out instead, chosen by --seed.", rich_help_panel=_DATA, show_default="0.5")] = None,
    column: Annotated[list[str] | None, Option(help="Map a column: input=question (several).", rich_help_panel=_DATA)] = None,
    where: Annotated[list[str] | None, Option(help="Keep rows only: label=1 (several).", rich_help_panel=_DATA)] = None,
    split: Annotated[str | None, Option(help="Split of a datasets name.", rich_help_panel=_DATA)] = None,
    limit: Annotated[int | None, Option(min=1, help="Use the first N examples.", rich_help_panel=_DATA)] = None,
    max_length: Annotated[int, Option(min=1, help="Longest example in tokens; longer inputs are cut.", rich_help_panel=_DATA)] = 512,
    turns: TurnsOption = Turns.all,
    chat: ChatOption = False,
    steps: Annotated[int, Option(min=1, help="Optimizer steps of a distillation.", rich_help_panel=_RUN)] = 100,
    batch_size: Annotated[int, Option(min=1, help="Examples a step.", rich_help_panel=_RUN)] = 8,
    learning_rate: Annotated[float | None, Option(help="Of a distillation.", rich_help_panel=_RUN, show_default="what suits keys and values")] = None,
    dtype: Annotated[str | None, Option(help="Of the base model: float32, bfloat16, …", rich_help_panel=_RUN)] = None,
    attn: Annotated[str | None, Option(help="Attention implementation of the base model.", rich_help_panel=_RUN)] = None,
    seed: Annotated[int, Option(rich_help_panel=_RUN)] = 0,
    plot: Annotated[Path | None, Option(help="Draw size against loss here (.png, .svg, .pdf).")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plans and their sizes, measure nothing, and stop.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on with the search in --out.", rich_help_panel=_RUN)] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Make a trained prefix smaller: try plans on held-out examples, keep the best one within the limits."""
    if out is None and not dry_run:
        raise ConfigError("--out names the folder for the smaller prefix; give one (or --dry-run, to only look)")
    share = valid_share if valid or valid_share is not None else 0.5
    source = Source(data, valid, share, column or (), where or (), split, limit, max_length, seed, turns.value, chat)
    chosen = tuple(dict.fromkeys(m.strip() for m in methods.split(",") if m.strip()))
    quiet()
    from rich.console import Console

    from foreword.compression import compress
    from foreword.compression.report import check_picture, draw_plans, verdict
    from foreword.compression.search import checked
    from foreword.prefix import Prefix

    if plot is not None:
        check_picture(plot)
    prefix = Prefix.load(folder)
    limits = checked(prefix, target_bytes, max_loss_increase, chosen)
    if dry_run:
        _plans(prefix, chosen, limits, as_json)
        return
    console = Console(stderr=True)
    examples = source.read()
    network, tokenizer = load_base(prefix, model, dtype=dtype, attn=attn)
    dataset, held_out = source.encode(examples, tokenizer, network)
    assert held_out is not None and out is not None
    console.print(f"data: {dataset.stats.describe()}")
    console.print(f"held out: {held_out.stats.describe()}")
    result = compress(
        network, tokenizer, prefix, dataset, held_out, target_bytes=target_bytes, max_loss_increase=max_loss_increase,
        methods=chosen, out=out, resume=resume, console=console,
        arguments={
            "max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
            "save_steps": max(1, min(50, steps // 4)),
        },
    )  # fmt: skip
    if plot is not None:
        draw_plans(result.candidates, result.limits, result.best, plot)
    if as_json:
        print_json(
            {"out": str(out) if result.best is not None else None, "verdict": verdict(result), **result.to_json()}
        )
    else:
        Console().print(_table(result))
    if result.interrupted:
        typer.echo(f"interrupted; go on with --resume --out {out}", err=True)
        raise typer.Exit(130)
    if result.best is None:
        raise ConfigError(verdict(result))
    if not as_json:
        typer.echo(f"{out}: {verdict(result)}")


def _plans(prefix: Prefix, methods: tuple[str, ...], limits: Any, as_json: bool) -> None:
    """What would be tried, and about how many bytes it takes."""
    from rich.console import Console
    from rich.table import Table

    from foreword.compression.planning import quick_plans, size_of

    sizes = [(plan, size_of(prefix, plan)) for plan in quick_plans(prefix, methods, limits)]
    if as_json:
        plans = [{"plan": plan.name, "nbytes": size, "fits": size <= limits.most_bytes} for plan, size in sizes]
        print_json({"before": {"bytes": limits.before_bytes}, "target_bytes": limits.target_bytes, "plans": plans})
        return
    table = Table("plan", "bytes of the file", "fits", title=f"{limits.before_bytes:,} bytes now")
    for plan, size in sizes:
        table.add_row(plan.name, f"{size:,}", "yes" if size <= limits.most_bytes else "")
    Console().print(table)


def _table(result: Compression) -> Table:
    from rich.table import Table

    now = f"now: {result.before_bytes:,} bytes, held-out loss {result.before:.4f} nats a token"
    table = Table("plan", "bytes of the file", "in memory", "loss", "rise", "s", "fits", title=now)
    for c in result.candidates:
        fits = ("bytes", c.small(result.limits)), ("loss", c.good(result.limits))
        table.add_row(
            c.plan.name, f"{c.nbytes:,}", f"{c.memory_nbytes:,}", f"{c.loss:.4f}", f"{c.increase:+.4f} ± {c.error:.4f}",
            f"{c.seconds:.1f}", "yes" if all(f for _, f in fits) else " ".join(n for n, f in fits if f),
            style="bold" if c is result.best else None,
        )  # fmt: skip
    return table
