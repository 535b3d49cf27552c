"""Padding encoded examples into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._under_way import BOUNDARY
from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IGNORED = -100


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right into one batch.

    Calling it with n examples returns ``input_ids`` and ``attention_mask``, both (n, length), and
    ``labels``, (n, length) too, or (n, target length) with seq2seq. All are torch.long. Padding has
    ``pad_token_id`` as its id, 0 in the mask and -100 as its label, so it never counts in the loss, even
    when it is the end token. Examples that have a ``condition`` (n vectors of one size) or a ``task`` (names)
    keep it.

    Args:
        pad_token_id: The id to pad with.
        seq2seq: The labels have a length of their own.
        pad_to_multiple_of: Round lengths up to a multiple of this.
    """

    pad_token_id: int
    seq2seq: bool = False
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.pad_token_id, bool) or not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise DataError(f"pad_token_id must be a token id of 0 or more; it is {self.pad_token_id!r}.")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise DataError(f"pad_to_multiple_of must be at least 1, or None; it is {self.pad_to_multiple_of!r}.")

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq2seq: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> Collator:
        """Pad with the tokenizer's padding token, or with its end token if it has none.

        Raises:
            DataError: If it has neither.
        """
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise DataError("The tokenizer has neither a padding nor an end token. Set tokenizer.pad_token.")
        return cls(int(pad), seq2seq=seq2seq, pad_to_multiple_of=pad_to_multiple_of)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch.

        Raises:
            DataError: If there are no examples, ids and labels differ in length without seq2seq, or an example's own
                boundary is none of its places.
        """
        if not examples:
            raise DataError("A batch needs at least one example.")
        inputs = [list(example["input_ids"]) for example in examples]
        labels = [list(example["labels"]) for example in examples]
        if not self.seq2seq:
            for index, (ids, targets) in enumerate(zip(inputs, labels, strict=True)):
                if len(ids) != len(targets):
                    raise DataError(
                        f"Example {index} of the batch has {len(ids)} ids and {len(targets)} labels. There "
                        "must be as many, unless the collator is made with seq2seq=True."
                    )
        given: dict[str, Any] = {}
        if "condition" in examples[0]:
            given["condition"] = torch.stack([torch.as_tensor(example["condition"]).float() for example in examples])
        if "task" in examples[0]:
            given["task"] = [example["task"] for example in examples]
        batch = given | {
            "input_ids": self._padded(inputs, self.pad_token_id),
            "attention_mask": self._padded([[1] * len(ids) for ids in inputs], 0),
            "labels": self._padded(labels, _IGNORED),
        }
        if not self.seq2seq:
            each = enumerate(zip(examples, labels, strict=True))
            batch[BOUNDARY] = torch.tensor([_boundary(i, example, targets) for i, (example, targets) in each])
        return batch

    def _padded(self, rows: list[list[int]], filler: int) -> Tensor:
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(row) for row in rows) // multiple) * multiple
        return torch.tensor([row + [filler] * (length - len(row)) for row in rows], dtype=torch.long)


def _boundary(number: int, example: Mapping[str, Any], labels: Sequence[int]) -> int:
    """How many tokens come before the output; all of them where there is none."""
    own = example.get(BOUNDARY)
    if own is None:
        return next((i for i, label in enumerate(labels) if label != _IGNORED), len(labels))
    if isinstance(own, bool) or int(own) != own or not 0 <= own <= len(labels):
        raise DataError(
            f"The boundary of example {number} of the batch is {own!r}. Expected how many of its {len(labels)} tokens "
            "come before its output."
        )
    return int(own)
