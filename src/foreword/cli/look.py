"""`foreword look`: inside a prefix, as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from foreword.cli._data import ChatOption, read
from foreword.cli._shared import load_base, pairs, print_json, quiet
from foreword.errors import ConfigError, DataError

if TYPE_CHECKING:
    from foreword.data import Example
    from foreword.prefix import Prefix

_DATA, _LOOK = "Data", "What is looked at"


def run(
    folder: Annotated[Path, Argument(help="Folder of a saved prefix.")],
    model: Annotated[str | None, Option(help="Base model: hub name, folder, .gguf file, or 'demo'.", show_default="the one that the prefix names")] = None,
    data: Annotated[list[str] | None, Option(help="Texts to look with, as for train: the outputs are what the loss is of.", rich_help_panel=_DATA)] = None,
    text: Annotated[list[str] | None, Option(help="A text to look with (several).", rich_help_panel=_DATA)] = None,
    out: Annotated[Path | None, Option(help="The page; with --json none is written unless named.", show_default="look.html")] = None,
    against: Annotated[Path | None, Option(help="Another prefix of the same base, to compare with.")] = None,
    only: Annotated[str | None, Option(help="Parts, with commas: share, dilution, words, norms, spectrum, similarity, layers.", rich_help_panel=_LOOK, show_default="all")] = None,
    lengths: Annotated[str | None, Option(help="Lengths of text for the dilution, in tokens, with commas.", rich_help_panel=_LOOK, show_default="8,16,… to 512")] = None,
    strengths: Annotated[str, Option(help="Weights of the prefix to try in the dilution, with commas.", rich_help_panel=_LOOK)] = "0.5,2",
    column: Annotated[list[str] | None, Option(help="Map a column: input=question (several).", rich_help_panel=_DATA)] = None,
    where: Annotated[list[str] | None, Option(help="Keep rows only: label=1 (several).", rich_help_panel=_DATA)] = None,
    split: Annotated[str | None, Option(help="Split of a datasets name.", rich_help_panel=_DATA)] = None,
    chat: ChatOption = False,
    limit: Annotated[int, Option(min=1, help="Use the first N examples.", rich_help_panel=_DATA)] = 16,
    max_length: Annotated[int, Option(min=2, help="Longest example in tokens; longer inputs are cut.", rich_help_panel=_DATA)] = 256,
    dtype: Annotated[str | None, Option(help="Of the base model: float32, bfloat16, …")] = None,
    force: Annotated[bool, Option("--force", help="Accept a base model with other weights.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:  # fmt: skip
    """Look inside a prefix: shares of attention, dilution, words, norms, spectra, similarity, layers."""
    if not data and not text:
        raise ConfigError('there is no text to look with; give --data FILE, or --text "The film was" (several)')
    quiet()
    from rich.console import Console

    from foreword.evaluate import inside
    from foreword.evaluate.inside.page import check_page
    from foreword.hub import shown

    parts = inside.PARTS if only is None else tuple(p.strip() for p in only.split(","))
    asked = [int(n) for n in _numbers(lengths, "--lengths", whole=True)] if lengths is not None else None
    tried = _numbers(strengths, "--strengths")
    target = out if out is not None or as_json else Path("look.html")
    if target is not None:
        check_page(target)
    prefix = _loaded(folder)
    other = (_name(against), _loaded(against)) if against is not None else None
    examples = _examples(data, text or [], column or [], where or [], split, limit, chat)
    base, tokenizer = load_base(prefix, model, kind=_kind(prefix), dtype=dtype)
    batches = inside.batches_of(base, tokenizer, examples, max_length=max_length)
    with _Bars(Console(stderr=True)) as bars:
        found = inside.look(
            base, prefix, tokenizer, batches, name=_name(folder), against=other, only=parts, lengths=asked,
            strengths=tried, force=force, progress=bars.passed,
        )  # fmt: skip
    if as_json:
        print_json(found.to_json())
    if target is not None:
        inside.write_page(found, target)
    if not as_json:
        typer.echo(f"{target}: {shown(folder)} on {len(examples)} texts; open it in a browser")


def _loaded(folder: Path) -> Prefix:
    from foreword.conditional import part_of
    from foreword.hub import shown
    from foreword.prefix import Prefix

    prefix = Prefix.load(folder)
    if part_of(prefix) is not None:
        raise ConfigError(
            f"{shown(folder)} depends on a condition vector; make a plain prefix of one in Python, "
            "fw.Prefix.load(...).given(vector).save(...), and look at that"
        )
    return prefix


def _name(folder: Path) -> str:
    return folder.resolve().name


def _kind(prefix: Prefix) -> str:
    """What transformers is to load, from the class that the prefix was made on."""
    from transformers.models.auto import modeling_auto

    name = prefix.fingerprint.model_class
    known: dict[str, Mapping[str, Any]] = {
        "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "encoder": modeling_auto.MODEL_MAPPING_NAMES,
    }
    for kind, classes in known.items():
        if any(name in ([of] if isinstance(of, str) else of) for of in classes.values()):
            return kind
    raise ConfigError(
        f"a prefix of {name or 'an unnamed class'} can't be looked at from the command line, which loads language models "
        "and plain encoders; use foreword.evaluate.inside.look(model, prefix, tokenizer, batches) in Python"
    )


def _examples(
    data: list[str] | None, texts: list[str], column: list[str], where: list[str], split: str | None, limit: int,
    chat: bool,
) -> list[Example]:  # fmt: skip
    from foreword.data import Example

    if blank := [i for i, t in enumerate(texts) if not t.strip()]:
        raise DataError(f"--text number {blank[0] + 1} is empty; expected some words")
    found = [Example("", t, f"--text {i + 1}") for i, t in enumerate(texts)]
    if data:
        columns, kept = pairs(column, "--column") or None, pairs(where, "--where") or None
        found += read(data, split=split, limit=limit, columns=columns, where=kept, chat=chat)
    return found


def _numbers(given: str, option: str, *, whole: bool = False) -> list[float]:
    try:
        found = [int(part) if whole else float(part) for part in given.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} {given!r}; expected numbers with commas") from None
    if any(not 0 < n < float("inf") for n in found):
        raise ConfigError(f"{option} {given!r}; expected numbers above 0")
    return [float(n) for n in found]


class _Bars:
    """A bar for each part."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def passed(self, part: str, done: int, total: int) -> None:
        if part not in self.tasks:
            self.tasks[part] = self.bar.add_task(part, total=total)
        self.bar.update(self.tasks[part], completed=done)
