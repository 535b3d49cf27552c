"""From the options about data to encoded examples, for the commands that train."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreword.cli._shared import pairs
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foreword.data import EncodedDataset

Examples = tuple[list[Any], list[Any] | None]


@dataclass(frozen=True)
class Source:
    """What the options say of data; the fields are named after them.

    Raises:
        ConfigError: the options contradict each other, or one is malformed.
    """

    data: str
    valid: str | None
    valid_share: float | None
    column: Sequence[str]
    where: Sequence[str]
    split: str | None
    limit: int | None
    max_length: int
    seed: int

    def __post_init__(self) -> None:
        if self.valid is not None and self.valid_share is not None:
            raise ConfigError("--valid names validation examples and --valid-share takes some of --data; give one")
        if self.valid_share is not None and not 0 < self.valid_share < 1:
            raise ConfigError(f"--valid-share {self.valid_share}; expected a share above 0 and below 1, e.g. 0.1")

    def read(self) -> Examples:
        """Training examples, and validation examples where there are any."""
        examples = self._read(self.data)
        if self.valid is not None:
            return examples, self._read(self.valid)
        if self.valid_share is None:
            return examples, None
        return hold_out(examples, self.valid_share, self.seed)

    def encode(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> tuple[EncodedDataset, EncodedDataset | None]:
        """The same as token ids."""
        return encode_both(examples, tokenizer, model, self.max_length)

    def arguments(self) -> list[str]:
        """The same as options of a command line."""
        found = ["--data", self.data]
        for name in ("valid", "valid_share", "split", "limit"):
            if (value := getattr(self, name)) is not None:
                found += [f"--{name.replace('_', '-')}", str(value)]
        for name in ("column", "where"):
            for value in getattr(self, name):
                found += [f"--{name}", value]
        return [*found, "--max-length", str(self.max_length)]

    def _read(self, source: str) -> list[Any]:
        from foreword.data import read_examples

        columns, where = pairs(self.column, "--column") or None, pairs(self.where, "--where") or None
        return read_examples(source, split=self.split, limit=self.limit, columns=columns, where=where)


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
    examples: Examples, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Examples for training, and for validation where there are any, as token ids."""
    from foreword.data import encode

    def encoded(part: list[Any]) -> EncodedDataset:
        return encode(part, tokenizer, max_length=max_length, seq2seq=model.config.is_encoder_decoder)

    train, valid = examples
    return encoded(train), encoded(valid) if valid is not None else None
