"""The encoded training set: token ids in memory, and what encoding did to them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class EncodeStats:
    """What ``encode`` produced, and what it cut.

    Attributes:
        examples: The number of examples.
        input_cut: How many lost tokens from the start of their input.
        output_cut: How many lost tokens from the end of their output, the end token among them.
        tokens: Tokens that the model reads; with seq2seq those of the encoder and the decoder.
        supervised_tokens: Tokens that the loss is computed on.
        longest: The length of the longest sequence, in tokens.
        turns_cut: How many answers before a conversation's last lost tokens, or all of them; they are not learned.
        notes: What else is not learned, or not read by the model: one sentence each, with how many examples.
    """

    examples: int
    input_cut: int
    output_cut: int
    tokens: int
    supervised_tokens: int
    longest: int
    turns_cut: int = 0
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return one line for people to read."""
        cut = [
            f"{count:,} {side}{'s' if count > 1 else ''} cut"
            for count, side in (
                (self.input_cut, "input"),
                (self.output_cut, "output"),
                (self.turns_cut, "earlier answer"),
            )
            if count
        ]
        return (
            f"{self.examples:,} example{'s' if self.examples != 1 else ''}, {self.tokens:,} tokens "
            f"({self.supervised_tokens:,} supervised), longest {self.longest:,}; "
            f"{', '.join(cut) or 'nothing cut'}"
        )


class EncodedDataset(Dataset[dict[str, Any]]):
    """Token ids and labels, one pair per example.

    An item is ``{"input_ids": list[int], "labels": list[int]}``, unpadded. Labels are -100 wherever there is
    no loss. For a causal model both have the same length; for seq2seq the labels are the decoder's target.

    Attributes:
        stats: What encoding did.
        form: What the examples were: "chat" (conversations), "alpaca" (instructions), "text", "mixed", or None where
            nobody said. A prefix that was trained on them remembers it.
    """

    def __init__(
        self,
        input_ids: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        stats: EncodeStats,
        columns: Mapping[str, Sequence[Any]] | None = None,
        form: str | None = None,
    ) -> None:
        # Arrays of 32-bit integers take a tenth of the memory of lists of Python integers.
        self._input_ids = [array("i", ids) for ids in input_ids]
        self._labels = [array("i", ids) for ids in labels]
        self.stats = stats
        self._columns = dict(columns or {})
        self.form = form

    def __len__(self) -> int:
        return len(self._input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = {"input_ids": list(self._input_ids[index]), "labels": list(self._labels[index])}
        return ids | {name: values[index] for name, values in self._columns.items()}

    def with_column(self, name: str, values: Sequence[Any]) -> EncodedDataset:
        """The same examples, each with one thing more.

        That is its ``condition`` (a vector), its ``task`` (a name), or its ``boundary`` (how many tokens come before
        the output, where that isn't where the labels begin).

        Raises:
            DataError: There are not as many values as examples, or the name is one of ours.
        """
        if name in ("input_ids", "labels"):
            raise DataError(f"A column can't be named {name!r}, which every example has; choose another name.")
        if len(values) != len(self):
            raise DataError(f"There are {len(values)} values for {name!r} and {len(self)} examples; give each one.")
        return EncodedDataset(self._input_ids, self._labels, self.stats, {**self._columns, name: values}, self.form)


def form_of(data: object) -> dict[str, str]:
    """``{"form": ...}`` as prefixes keep it, of a data set that knows it (or a mixture of such); else empty."""
    parts = [getattr(part, "rows", part) for part in getattr(data, "parts", {"": data}).values()]
    forms = {getattr(part, "form", None) for part in parts}
    form = forms.pop() if len(forms) == 1 else "mixed" if all(isinstance(f, str) for f in forms) else None
    return {"form": form} if isinstance(form, str) else {}
