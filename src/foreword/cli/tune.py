"""`foreword tune`: search length, learning rate, start and reparameterisation on a budget."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer import Option

from foreword.cli._data import ChatOption, Source, Turns, TurnsOption
from foreword.cli._methods import Gate
from foreword.cli._shared import print_json, quiet
from foreword.errors import ConfigError, DivergedError

if TYPE_CHECKING:
    from rich.table import Table

    from foreword.config import PrefixConfig
    from foreword.train.tune_report import TrialRecord, TuneResult

_SPACE, _PREFIX, _DATA, _RUN = "What is tried", "Prefix", "Data", "Run"


def run(
    model: Annotated[str, Option(help="Base model: hub name, folder, .gguf file, or 'demo' (the packaged SmolLM2).")],
    data: Annotated[list[str], Option(help="Examples, as for train.")],
    out: Annotated[Path, Option(help="Folder for the search.")],
    valid: Annotated[list[str] | None, Option(help="Validation examples, which trials are judged by.")] = None,
    valid_share: Annotated[float | None, Option(help="Hold this share of --data out for validation instead, chosen by --seed.", rich_help_panel=_DATA)] = None,
    budget: Annotated[str, Option(help="Trials (20), or time spent on them (300s, 10m, 2h).")] = "20",
    lengths: Annotated[str, Option(help="Virtual tokens, with commas.", rich_help_panel=_SPACE)] = "5,10,20,50",
    learning_rates: Annotated[str | None, Option(help="Range, drawn on a log scale: 1e-3:5e-2.", rich_help_panel=_SPACE, show_default="0.1 to 3 times what suits the reparameterisation")] = None,
    inits: Annotated[str | None, Option(help="Starts, with commas: default (a general text), random, a text, 'words:good film'.", rich_help_panel=_SPACE, show_default="default,random")] = None,
    init: Annotated[list[str] | None, Option(help="One start more, a text that may hold commas (several).", rich_help_panel=_SPACE)] = None,
    reparams: Annotated[str, Option(help="Of direct, mlp and low-rank, with commas.", rich_help_panel=_SPACE)] = "direct,mlp,low-rank",
    repeat: Annotated[bool, Option(help="Repeat an init text that is shorter than the prefix.", rich_help_panel=_PREFIX)] = False,
    depth: Annotated[int, Option(help="Layers of the MLP.", rich_help_panel=_PREFIX)] = 2,
    hidden: Annotated[int, Option(help="Width of the MLP.", rich_help_panel=_PREFIX)] = 512,
    rank: Annotated[int, Option(help="Rank of the low-rank change.", rich_help_panel=_PREFIX)] = 8,
    sites: Annotated[str | None, Option(help="first:4, last:4, every:2, or a regular expression over attention sites.", rich_help_panel=_PREFIX)] = None,
    kinds: Annotated[str, Option(help="Kinds of site, with commas.", rich_help_panel=_PREFIX)] = "self,cross,encoder",
    visible: Annotated[str, Option(help="Who sees the prefix: all, infix, infix:1, first:16, window:4:32.", rich_help_panel=_PREFIX)] = "all",
    gate: Annotated[Gate, Option(help="Learned weight of the prefix.", rich_help_panel=_PREFIX)] = Gate.none,
    dropout: Annotated[float, Option(help="Dropout on the prefix.", rich_help_panel=_PREFIX)] = 0.0,
    freeze_first: Annotated[bool, Option(help="Keep the first token as initialised.", rich_help_panel=_PREFIX)] = False,
    column: Annotated[list[str] | None, Option(help="Map a column: input=question (several).", rich_help_panel=_DATA)] = None,
    where: Annotated[list[str] | None, Option(help="Keep rows only: label=1 (several).", rich_help_panel=_DATA)] = None,
    split: Annotated[str | None, Option(help="Split of a datasets name.", rich_help_panel=_DATA)] = None,
    limit: Annotated[int | None, Option(min=1, help="Use the first N examples.", rich_help_panel=_DATA)] = None,
    max_length: Annotated[int, Option(min=1, help="Longest example in tokens; longer inputs are cut.", rich_help_panel=_DATA)] = 512,
    turns: TurnsOption = Turns.all,
    chat: ChatOption = False,
    steps: Annotated[int, Option(min=1, help="Optimizer steps of a trial.", rich_help_panel=_RUN)] = 100,
    batch_size: Annotated[int, Option(min=1, help="Examples a step.", rich_help_panel=_RUN)] = 8,
    eval_every: Annotated[int | None, Option(min=1, help="Steps between validations.", rich_help_panel=_RUN, show_default="five a trial")] = None,
    prune: Annotated[bool, Option(help="Stop trials early that are worse than the median of the others.", rich_help_panel=_RUN)] = True,
    dtype: Annotated[str | None, Option(help="Of the base model: float32, bfloat16, …", rich_help_panel=_RUN)] = None,
    attn: Annotated[str | None, Option(help="Attention implementation of the base model.", rich_help_panel=_RUN)] = None,
    seed: Annotated[int, Option(min=0, rich_help_panel=_RUN)] = 0,
    resume: Annotated[bool, Option("--resume", help="Go on with the search in --out, or join it while another process is at work on it.", rich_help_panel=_RUN)] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Search length, learning rate, start and reparameterisation of a prefix on a budget."""
    if not valid and valid_share is None:
        raise ConfigError("trials are judged by validation examples: give --valid, or --valid-share 0.1 of --data")
    chosen = _choices(lengths, learning_rates, inits, init or [], reparams)
    quiet()
    from rich.console import Console

    from foreword.config import PrefixConfig
    from foreword.models import load_model
    from foreword.train.space import Budget, SearchSpace
    from foreword.train.tune import tune

    console, limits = Console(stderr=True), Budget.parse(budget)
    base = PrefixConfig(
        repeat=repeat, depth=depth, hidden=hidden, rank=rank, sites=sites, dropout=dropout, visible=visible,
        kinds=tuple(k.strip() for k in kinds.split(",")), freeze_first=freeze_first, seed=seed,
        gate=cast("Any", None if gate is Gate.none else gate.value),
    )  # fmt: skip
    space = SearchSpace(**chosen, base=base)
    source = Source(
        data, valid, valid_share, column or (), where or (), split, limit, max_length, seed, turns.value, chat
    )
    examples = source.read()
    network, tokenizer = load_model(model, dtype=dtype, attn=attn)
    train_set, valid_set = source.encode(examples, tokenizer, network)
    console.print(f"data: {train_set.stats.describe()}")
    result = tune(
        network, tokenizer, train_set, valid_set, out, space, budget=limits, steps=steps,
        eval_every=eval_every, prune=prune, seed=seed, resume=resume, console=console,
        arguments={"per_device_train_batch_size": batch_size},
    )  # fmt: skip
    run_options = ["--steps", steps, "--batch-size", batch_size, "--seed", seed]
    given = ["--model", model, *source.arguments(), *run_options]
    for name, value in (("--dtype", dtype), ("--attn", attn)):
        given += [name, value] if value is not None else []
    _show(result, out, [str(a) for a in given], console, as_json)


def _choices(lengths: str, rates: str | None, inits: str | None, more: list[str], reparams: str) -> dict[str, Any]:
    """As fields of ``SearchSpace``."""
    try:
        numbers = tuple(int(n) for n in lengths.split(","))
    except ValueError:
        raise ConfigError(f"--lengths {lengths!r}; expected whole numbers with commas, e.g. 5,10,20") from None
    interval = None
    if rates is not None:
        try:
            low, high = (float(r) for r in rates.split(":"))
        except ValueError:
            raise ConfigError(f"--learning-rates {rates!r}; expected lowest:highest, e.g. 1e-3:5e-2") from None
        interval = (low, high)
    texts = inits.split(",") if inits is not None else [] if more else ["default", "random"]
    starts = [t.strip() for t in texts] + more
    return {
        "lengths": numbers, "learning_rates": interval, "reparams": tuple(r.strip() for r in reparams.split(",")),
        "inits": tuple(None if s == "default" else s for s in starts),
    }  # fmt: skip


def _show(result: TuneResult, out: Path, given: list[str], console: Any, as_json: bool) -> None:
    """The result, on stdout; what to do next, on stderr."""
    command = None
    if result.config is not None:
        command = shlex.join(["foreword", "train", *given, "--out", str(out / "best"), *_options(result.config)])
    if as_json:
        comparison = result.comparison
        print_json({
            "out": str(out), "interrupted": result.interrupted, "best": result.best.number if result.best else None,
            "loss": result.best.loss if result.best else None, "config": result.best.config if result.best else None,
            "gain": comparison.gain if comparison else None, "clear": comparison.clear if comparison else None,
            "verdict": result.verdict, "command": command,
            "trials": [vars(t) for t in result.trials],
        })  # fmt: skip
    else:
        from rich.console import Console

        Console().print(_table(result.trials, result.best))
        typer.echo(result.verdict)
        if command is not None:
            typer.echo(f"train it so:\n  {command}")
        typer.echo(f"written: {', '.join(str(p) for p in sorted(out.glob('*.json')))}, {out / 'tune.png'}")
    if result.interrupted:
        typer.echo(f"interrupted; go on with --resume --out {out}", err=True)
        raise typer.Exit(130)
    if result.best is None and all(t.outcome in ("diverged", "stopped") for t in result.trials):
        raise DivergedError("every trial diverged; give lower --learning-rates, or starts from a text")


def _table(trials: list[TrialRecord], best: TrialRecord | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("trial", "length", "start", "reparam", "learning rate", "loss", "outcome", "s", title="trials")
    for t in trials:
        config = t.config
        start = config.get("init") or "default" if config else ""
        rate = f"{config['learning_rate']:.2e}" if config else ""
        note = t.outcome + (", default" if t.default else "") + (", best" if best and t.number == best.number else "")
        table.add_row(
            str(t.number), str(config.get("length", "")), Text(start if len(start) <= 24 else f"{start[:23]}…"),
            config.get("reparam", ""), rate, f"{t.loss:.4f}" if t.loss is not None else "", note,
            f"{t.seconds:.0f}" if t.seconds is not None else "",
            style="bold" if best and t.number == best.number else None,
        )  # fmt: skip
    return table


def _options(config: PrefixConfig) -> list[str]:
    """The options of `foreword train` that make a configuration: those that aren't the default."""
    from foreword.config import PrefixConfig

    plain, own = PrefixConfig().to_json(), config.to_json()
    found = ["--length", str(own["length"]), "--learning-rate", repr(own["learning_rate"])]
    for name in ("init", "reparam", "depth", "hidden", "rank", "sites", "visible", "gate", "dropout"):
        if own[name] != plain[name]:
            found += [f"--{name}", str(own[name])]
    if own["kinds"] != plain["kinds"]:
        found += ["--kinds", ",".join(own["kinds"])]
    return found + [f"--{name.replace('_', '-')}" for name in ("repeat", "freeze_first") if own[name]]
