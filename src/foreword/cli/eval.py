"""`foreword eval`: score predictions, or generate and score, or run tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from foreword.cli._eval_tables import show, show_harness, show_metrics
from foreword.cli._shared import pairs, print_json, quiet
from foreword.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from foreword.evaluate.predict import Decoding

_WRITE, _DATA, _HARNESS = "Writing", "Data", "lm-evaluation-harness"


class How(StrEnum):
    greedy = "greedy"
    beam = "beam"
    paper = "paper"
    sample = "sample"


# What else would be left out without a word.
_GOES_WITH = {
    "beams": (How.beam,),
    "length_penalty": (How.beam, How.paper),
    "temperature": (How.sample,),
    "top_p": (How.sample,),
}


def run(
    data: Annotated[list[str] | None, Option(help="Examples: .jsonl, .csv, .parquet, a datasets name, or - (several are joined). Columns input and references (or output), messages, or as for train.")] = None,
    predictions: Annotated[Path | None, Option(help="Score these: .jsonl with prediction, or a text a line. Without it --model writes them.")] = None,
    model: Annotated[str | None, Option(help="Base model that writes, and that judges perplexity: hub name, folder, .gguf file, or 'demo'.")] = None,
    prefix: Annotated[list[Path] | None, Option(help="Folder of a saved prefix to write with (several are attached together).")] = None,
    metrics: Annotated[str | None, Option(help="Names with commas: bleu,rougeL. --list shows all.")] = None,
    task: Annotated[str | None, Option(help="Or those of a kind of task: e2e, summary, rewrite, reviews, labels, entities, answers.")] = None,
    out: Annotated[Path | None, Option(help="Folder for predictions.jsonl and metrics.json.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with a killed evaluation in --out, or score a finished one again.")] = False,
    against: Annotated[Path | None, Option(help="Compare with the evaluation in this folder, pair by pair.")] = None,
    intervals: Annotated[int, Option(min=0, help="Bootstrap resamples for 95 % intervals and comparisons; 0: none.")] = 1000,
    seed: Annotated[int, Option(help="Of drawing and of the resamples.")] = 0,
    decoding: Annotated[How, Option(help="paper: 5 beams (with --task summary 6, length penalty 0.8).", rich_help_panel=_WRITE)] = How.greedy,
    max_new_tokens: Annotated[int, Option(min=1, rich_help_panel=_WRITE)] = 64,
    beams: Annotated[int | None, Option(min=1, help="With --decoding beam; 5 by default.", rich_help_panel=_WRITE)] = None,
    length_penalty: Annotated[float | None, Option(help="With beams: above 1 for longer texts.", rich_help_panel=_WRITE)] = None,
    temperature: Annotated[float | None, Option(help="With --decoding sample; 1 by default.", rich_help_panel=_WRITE)] = None,
    top_p: Annotated[float | None, Option(help="With --decoding sample; 1 by default.", rich_help_panel=_WRITE)] = None,
    no_repeat: Annotated[int, Option(min=0, help="No n-gram of this size twice.", rich_help_panel=_WRITE)] = 0,
    stop: Annotated[str | None, Option(help=r"An output ends before this text; \n is a line end.", rich_help_panel=_WRITE)] = None,
    max_length: Annotated[int | None, Option(min=1, help="Longest input in tokens; longer ones lose their start.", rich_help_panel=_WRITE)] = None,
    batch_size: Annotated[int, Option(min=1, rich_help_panel=_WRITE)] = 8,
    strength: Annotated[float, Option(min=0.0, help="Weight of the prefix: 1 as trained, 0 none.", rich_help_panel=_WRITE)] = 1.0,
    dtype: Annotated[str | None, Option(rich_help_panel=_WRITE)] = None,
    force: Annotated[bool, Option("--force", help="Accept a base model with other weights.", rich_help_panel=_WRITE)] = False,
    column: Annotated[list[str] | None, Option(help="Map a column: references=summary (several).", rich_help_panel=_DATA)] = None,
    where: Annotated[list[str] | None, Option(help="Keep rows only: label=1 (several).", rich_help_panel=_DATA)] = None,
    split: Annotated[str | None, Option(help="Split of a datasets name.", rich_help_panel=_DATA)] = None,
    limit: Annotated[int | None, Option(min=1, help="Use the first N examples.", rich_help_panel=_DATA)] = None,
    group: Annotated[bool, Option("--group", help="Rows of equal input are one example with several references.", rich_help_panel=_DATA)] = False,
    wanted: Annotated[str | None, Option(help="What all texts are meant to be (positive, negative), where rows have no label.", rich_help_panel=_DATA)] = None,
    harness: Annotated[list[str] | None, Option(help="Run these instead: task names of the harness, or .yaml task files.", rich_help_panel=_HARNESS)] = None,
    shots: Annotated[int | None, Option(min=0, help="Examples before each question.", rich_help_panel=_HARNESS)] = None,
    chat: Annotated[bool, Option("--chat", help="Put inputs, or the harness's questions, into the model's chat template.", rich_help_panel=_WRITE)] = False,
    trust_code: Annotated[bool, Option("--trust-code", help="Run the Python functions that a task file names.", rich_help_panel=_HARNESS)] = False,
    list_metrics: Annotated[bool, Option("--list", help="Show the metrics and stop.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Score predictions in a file, or what a model writes with a prefix; with intervals, and against another run."""
    from rich.console import Console

    if list_metrics:
        show_metrics(as_json)
        return
    if harness:
        if model is None or data or predictions is not None:
            raise ConfigError("--harness brings its own data; give it --model (and --prefix), without --data")
        if metrics is not None or task is not None or against is not None or resume:
            raise ConfigError("--harness has metrics of its own; leave out --metrics, --task, --against and --resume")
        _harness(
            harness, model, prefix or [], out, shots, limit, batch_size, seed, chat, trust_code, dtype, force, as_json
        )
        return
    if shots is not None or trust_code:
        raise ConfigError("--shots and --trust-code go with --harness; name its task, or leave them out")
    names = _names(metrics, task)
    if not data or (predictions is None and model is None):
        raise ConfigError("give --data with --predictions (to score a file), or with --model (to write and score)")
    if predictions is not None and prefix:
        raise ConfigError("--prefix is for writing, and --predictions are written already; give one of them")
    from foreword.cli._data import say
    from foreword.data.examples import Unused
    from foreword.evaluate.examples import read_tasks
    from foreword.evaluate.job import Evaluation, Writer

    unused = Unused()
    tasks = read_tasks(
        data[0] if len(data) == 1 else data, columns=pairs(column or [], "--column") or None, split=split, limit=limit,
        chat=chat, unused=unused, where=pairs(where or [], "--where") or None, group=group,
    )  # fmt: skip
    if unused:
        say(unused.describe())
    if wanted is not None:
        tasks = [replace(t, label=t.label if t.label is not None else wanted) for t in tasks]
    writer = None
    if model is not None:
        quiet()
        how = _decoding(
            decoding, task, seed, max_new_tokens, beams, length_penalty, temperature, top_p, no_repeat, stop, max_length
        )
        writer = Writer(model, tuple(prefix or ()), how, batch_size, strength, dtype, force)
    job = Evaluation(tasks, names, ", ".join(Path(d).name for d in data), predictions, writer, intervals, seed)
    try:
        record = job.run(out, resume=resume, against=against, progress=partial(_bar, Console(stderr=True)))
    except KeyboardInterrupt:
        if out is not None and (out / "run.json").exists():
            typer.echo("interrupted; go on with --resume", err=True)
        raise
    if as_json:
        print_json(record)
    else:
        show(record, out)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("writing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _names(metrics: str | None, task: str | None) -> list[str]:
    from foreword.evaluate.metrics import TASKS, known

    found = [n.strip() for n in (metrics or "").split(",") if n.strip()]
    if task is not None:
        if task not in TASKS:
            raise ConfigError(f"--task {task}: no such kind of task; {nearest(task, TASKS, n=2)}")
        found += TASKS[task]
    if not found:
        raise ConfigError(
            "--metrics names what to measure, e.g. bleu,rougeL (--list shows all), or --task a kind of task"
        )
    return [known(name).name for name in dict.fromkeys(found)]


def _decoding(
    how: How, task: str | None, seed: int, max_new_tokens: int, beams: int | None, length_penalty: float | None,
    temperature: float | None, top_p: float | None, no_repeat: int, stop: str | None, max_length: int | None,
) -> Decoding:  # fmt: skip
    from foreword.evaluate.predict import Decoding

    asked = {"beams": beams, "length_penalty": length_penalty, "temperature": temperature, "top_p": top_p}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    for name in given:
        if how not in _GOES_WITH[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} goes with --decoding {' or '.join(_GOES_WITH[name])}, and it is {how}; "
                "leave one of them out"
            )
    common: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "no_repeat": no_repeat, "max_input_tokens": max_length, "seed": seed,
        "stop": stop.replace("\\n", "\n") if stop is not None else None,
    }  # fmt: skip
    if how is How.paper:
        return Decoding.paper("summary" if task == "summary" else "table", **common, **given)
    if how is How.beam:
        return Decoding(**{"beams": 5, **common, **given})
    return Decoding(sample=how is How.sample, **common, **given)


def _harness(
    tasks: list[str], model: str, folders: list[Path], out: Path | None, shots: int | None, limit: int | None,
    batch_size: int, seed: int, chat: bool, trust_code: bool, dtype: str | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    quiet()
    from foreword.conditional import plain_prefixes
    from foreword.evaluate.harness import evaluate_tasks
    from foreword.evaluate.run import Folder, finite
    from foreword.models import load_model

    if out is not None:
        Folder(out).require(resume=False)
    prefixes = plain_prefixes(folders)
    base, tokenizer = load_model(model, dtype=dtype)
    options: dict[str, Any] = {"shots": shots, "limit": limit, "batch_size": batch_size, "seed": seed, "chat": chat}
    result = evaluate_tasks(
        base,
        tokenizer,
        list(tasks),
        prefix=prefixes or None,
        trust_code=trust_code,
        force=force,
        **options,
    )
    record = finite({"model": model, "prefixes": [str(p) for p in folders], **options, "tasks": result["tasks"]})
    if out is not None:
        Folder(out).begin({"harness": tasks}, resume=False)
        Folder(out).score(record)
    if as_json:
        print_json(record)
    else:
        show_harness(record)
