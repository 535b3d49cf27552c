"""From the options about data to encoded examples, for the commands that train."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from foreword.cli._shared import pairs
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foreword.data import EncodedDataset, Example
    from foreword.data.examples import Examples as Found

Examples = tuple[list[Any], list[Any] | None]


class Turns(StrEnum):
    all = "all"
    last = "last"


_DATA = "Data"
TurnsOption = Annotated[
    Turns, Option(help="Which answers of a conversation are learned: all, or the last.", rich_help_panel=_DATA)
]
ChatOption = Annotated[
    bool,
    Option(
        "--chat",
        help="Make conversations of inputs and outputs (and instructions, system), for the chat template.",
        rich_help_panel=_DATA,
    ),
]


@dataclass(frozen=True)
class Source:
    """What the options say of data; the fields are named after them.

    Attributes:
        label: whose data these are, for what is said of them.

    Raises:
        ConfigError: the options contradict each other, or one is malformed.
    """

    data: str | Sequence[str]
    valid: str | Sequence[str] | None
    valid_share: float | None
    column: Sequence[str]
    where: Sequence[str]
    split: str | None
    limit: int | None
    max_length: int
    seed: int
    turns: str = "all"
    chat: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        if self.valid and self.valid_share is not None:
            raise ConfigError("--valid names validation examples and --valid-share takes some of --data; give one")
        if self.valid_share is not None and not 0 < self.valid_share < 1:
            raise ConfigError(f"--valid-share {self.valid_share}; expected a share above 0 and below 1, e.g. 0.1")
        if [*_each(self.data), *_each(self.valid)].count("-") > 1:
            raise ConfigError("standard input can be read once; let - be one of --data and --valid, given once")

    def read(self) -> Examples:
        """Training examples, and validation examples where there are any."""
        examples = self._read(self.data)
        valid = self._read(self.valid) if self.valid else None
        for line in dict.fromkeys(found.describe_unused() for found in (examples, valid) if found and found.unused):
            say(line, self.label)
        if valid is not None or self.valid_share is None:
            return examples, valid
        return hold_out(examples, self.valid_share, self.seed)

    def encode(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> tuple[EncodedDataset, EncodedDataset | None]:
        """The same as token ids."""
        return encode_both(examples, tokenizer, model, self.max_length, self.turns, self.label)

    def arguments(self) -> list[str]:
        """The same as options of a command line."""
        found = [
            part for name in ("data", "valid") for value in _each(getattr(self, name)) for part in (f"--{name}", value)
        ]
        for name in ("valid_share", "split", "limit"):
            if (value := getattr(self, name)) is not None:
                found += [f"--{name.replace('_', '-')}", str(value)]
        for name in ("column", "where"):
            for value in getattr(self, name):
                found += [f"--{name}", value]
        found += [*(["--turns", self.turns] if self.turns != "all" else []), *(["--chat"] if self.chat else [])]
        return [*found, "--max-length", str(self.max_length)]

    def _read(self, source: str | Sequence[str]) -> Found:
        columns, where = pairs(self.column, "--column") or None, pairs(self.where, "--where") or None
        return _collected(source, split=self.split, limit=self.limit, columns=columns, where=where, chat=self.chat)


def read(source: str | Sequence[str], **options: Any) -> list[Example]:
    """The examples of one or several sources; says which columns are not used.

    Args:
        options: of :func:`foreword.data.read_examples`.

    Raises:
        DataError: as ``read_examples``.
    """
    found = _collected(source, **options)
    if found.unused:
        say(found.describe_unused())
    return found


def _collected(source: str | Sequence[str], **options: Any) -> Found:
    from foreword.data.examples import collect

    sources = _each(source)
    return collect(sources[0] if len(sources) == 1 else sources, **options)


def say(line: str, label: str = "") -> None:
    """A line about data, on stderr."""
    typer.echo(f"data: {label}: {line}" if label else f"data: {line}", err=True)


def _each(sources: str | Sequence[str] | None) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources or ())


def hold_out(examples: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Examples for training, and a share of them for validation.

    Raises:
        ConfigError: one of the two would be empty.
    """
    held = round(share * len(examples))
    if not 0 < held < len(examples):
        raise ConfigError(
            f"--valid-share {share} of {len(examples)} examples leaves {held} for validation and "
            f"{len(examples) - held} for training; expected some of both"
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), held))
    kept = [e for i, e in enumerate(examples) if i not in chosen]
    return kept, [examples[i] for i in sorted(chosen)]


def encode_both(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    max_length: int,
    turns: str = "all",
    label: str = "",
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Examples for training, and for validation where there are any, as token ids; says what isn't learned of them."""
    from foreword.data import encode

    def encoded(part: list[Any]) -> EncodedDataset:
        seq2seq = bool(model.config.is_encoder_decoder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = encode(part, tokenizer, max_length=max_length, seq2seq=seq2seq, turns=turns)  # type: ignore[arg-type]
        for note in found.stats.notes:
            say(note, label)
        return found

    train, valid = examples
    return encoded(train), encoded(valid) if valid is not None else None
