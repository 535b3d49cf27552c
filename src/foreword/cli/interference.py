"""`foreword interference`: every task's loss under every prefix, and under none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from foreword.cli._data import ChatOption, Turns, TurnsOption
from foreword.cli._shared import pairs, print_json, quiet
from foreword.cli._tasks import TaskSources
from foreword.errors import PrefixFileError

_DATA = "Data"


def run(
    model: Annotated[str, Option(help="Base model: hub name, folder, .gguf file, or 'demo'.")],
    task: Annotated[list[str], Option(help="Held-out examples of a task: reviews=F.jsonl (several).")],
    prefix: Annotated[list[str], Option(help="A saved prefix: reviews=DIR (several), or the folder of a run of several tasks.")],
    plot: Annotated[Path | None, Option(help="Draw the matrix as a heat map: .png or .svg.")] = None,
    column: Annotated[list[str] | None, Option(help="Map a column: input=question, or of one task reviews:input=question.", rich_help_panel=_DATA)] = None,
    where: Annotated[list[str] | None, Option(help="Keep rows only: label=1, or of one task reviews:label=1.", rich_help_panel=_DATA)] = None,
    split: Annotated[str | None, Option(help="Split of a datasets name.", rich_help_panel=_DATA)] = None,
    limit: Annotated[int | None, Option(min=1, help="Use the first N examples of each task.", rich_help_panel=_DATA)] = None,
    max_length: Annotated[int, Option(min=1, help="Longest example in tokens; longer inputs are cut.", rich_help_panel=_DATA)] = 512,
    turns: TurnsOption = Turns.all,
    chat: ChatOption = False,
    batch_size: Annotated[int, Option(min=1, help="Examples a pass.")] = 16,
    dtype: Annotated[str | None, Option(help="Of the base model: float32, bfloat16, …")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the matrix as JSON.")] = False,
) -> None:  # fmt: skip
    """Measure what tasks do to each other: each task's held-out loss under each prefix, and under none."""
    sources = TaskSources.of(
        task, column=column or (), where=where or (), valid_share=None, split=split, limit=limit, max_length=max_length,
        seed=0, turns=turns.value, chat=chat,
    )  # fmt: skip
    folders = _folders(prefix)
    examples = sources.read()
    quiet()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from foreword.data import Collator
    from foreword.evaluate import measure_interference
    from foreword.models import load_model
    from foreword.prefix import Prefix

    prefixes = {name: Prefix.load(folder) for name, folder in folders.items()}
    base, tokenizer = load_model(model, dtype=dtype)
    data, _ = sources.encode(examples, tokenizer, base)
    collator = Collator.for_tokenizer(tokenizer, seq2seq=base.config.is_encoder_decoder)
    columns = (TextColumn("examples read"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        reading = bar.add_task("", total=(len(prefixes) + 1) * sum(map(len, data.values())))
        found = measure_interference(
            base, data, prefixes, collator, batch_size=batch_size, done=lambda n: bar.advance(reading, n)
        )
    if plot is not None:
        found.draw(plot)
    if as_json:
        print_json(found.to_json())
        return
    console = Console()
    console.print(found.table())
    console.print("nats a token; in brackets, how far above the task's own prefix, and the standard error of that")
    if plot is not None:
        typer.echo(f"drawn: {plot}")


def _folders(options: list[str]) -> dict[str, Path]:
    """Prefix folders by name; the folder of a run of several tasks stands for all in it.

    Raises:
        ConfigError: two of one name.
        PrefixFileError: a folder holds no prefix.
    """
    from foreword.hub import located

    named = []
    for option in options:
        if "=" in option and not Path(option).is_dir():
            named.append(option)
            continue
        folder = located(option)
        if (folder / "foreword.json").is_file():
            named.append(f"{Path(option).resolve().name}={option}")
            continue
        inside = sorted(f for f in folder.glob("*/foreword.json") if not f.parent.name.startswith("checkpoint-"))
        if not inside:
            raise PrefixFileError(
                f"--prefix {option}: expected NAME=FOLDER, or a folder that holds a prefix or one of each task"
            )
        named += [f"{f.parent.name}={f.parent}" for f in inside]
    return {name: Path(folder) for name, folder in pairs(named, "--prefix").items()}
