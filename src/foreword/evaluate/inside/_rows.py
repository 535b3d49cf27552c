"""What the diagnostics run on: texts without padding, texts cut or grown, a prefix that stands for a while."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword._boundary import told
from foreword.conditional import part_of
from foreword.errors import ConfigError, DataError
from foreword.losses import IGNORED
from foreword.prefix import Prefix
from foreword.sites import evaluating
from foreword.tuning import Tuning, attach

Row = dict[str, Any]  # the arguments of one forward pass of one text
Batches = Sequence[Mapping[str, Any]]

_ALONG = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")  # one entry a token


@dataclass(frozen=True)
class Unavailable:
    """A diagnostic that this prefix, model or data has no answer to.

    Attributes:
        why: the reason, in a sentence.
    """

    why: str

    def to_json(self) -> dict[str, Any]:
        return {"unavailable": self.why}


def require_plain(prefix: Prefix) -> None:
    """Raise ConfigError where a prefix has no keys and values until it is given a condition."""
    if part_of(prefix) is not None:
        raise ConfigError(
            "this prefix depends on a condition vector; look at the plain one that it makes of a vector: "
            "prefix.given(vector)"
        )


@contextmanager
def standing(
    model: PreTrainedModel, prefix: Prefix, *, strength: float | None = None, force: bool = False
) -> Iterator[Tuning]:
    """Inside the block, the prefix stands on the model, in eval mode and without gradients.

    Raises:
        ConfigError: the prefix is still to be made of a condition.
        MismatchError: it belongs to another model.
        AttachError: the model has a prefix already.
    """
    require_plain(prefix)
    tuning = attach(model, prefix, strength=strength, force=force)
    try:
        with evaluating(model), torch.no_grad():
            yield tuning
    finally:
        tuning.detach()


def rows_of(model: PreTrainedModel, batches: Batches) -> list[Row]:
    """Each text of (right-)padded batches on its own, without its padding.

    Raises:
        DataError: there is no text.
    """
    seq2seq, more = model.config.is_encoder_decoder, without_cache(model)
    rows = [_unpadded(_cut_out(batch, i), seq2seq) | more for batch in batches for i in range(_size(batch))]
    if not rows:
        raise DataError("there is no text to look at a prefix with; give one batch or more")
    return rows


def _size(batch: Mapping[str, Any]) -> int:
    return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)


def _cut_out(batch: Mapping[str, Any], i: int) -> Row:
    """The arguments of one row; what is the same for all rows stays."""
    size = _size(batch)
    of_rows = {n for n, v in batch.items() if isinstance(v, list) or (isinstance(v, Tensor) and v.shape[:1] == (size,))}
    return {n: v[i : i + 1] if n in of_rows else v for n, v in batch.items()}


def _unpadded(row: Row, seq2seq: bool) -> Row:
    mask, labels = row.get("attention_mask"), row.get("labels")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kept = mask[0] != 0
        along = _ALONG if seq2seq else (*_ALONG, "labels")
        for name in along:
            value = row.get(name)
            if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == len(kept):
                row[name] = value[:, kept]
    if seq2seq and isinstance(labels, Tensor) and labels.dim() == 2 and bool((labels != IGNORED).any()):
        row["labels"] = labels[:, : int((labels[0] != IGNORED).nonzero().max()) + 1]
    return row


def takes(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's forward has an argument."""
    return name in inspect.signature(model.forward).parameters


def without_cache(model: PreTrainedModel) -> Row:
    """Arguments that keep a pass from making a cache, where the model has one."""
    return {"use_cache": False} if takes(model, "use_cache") else {}


# ------------------------------------------------------------------------------------------ texts of one length


def grown(model: PreTrainedModel, rows: Sequence[Row], length: int, count: int) -> Row:
    """A batch of (at most) ``count`` texts of ``length`` tokens: each cut, or going on with the texts after it."""
    decoding = model.config.is_encoder_decoder
    texts = [_ids(row) for row in rows]
    batch: Row = {"input_ids": _joined(texts, length, count)}
    if decoding:
        outputs = _joined([_decoder_ids(row) for row in rows], length, count)
        if "decoder_input_ids" not in rows[0]:  # labels: what the decoder reads begins with its start token
            shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            outputs = shift(labels=outputs) if shift is not None else outputs
        batch["decoder_input_ids"] = outputs
    if takes(model, "attention_mask"):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch | without_cache(model)


def tokens_in(model: PreTrainedModel, rows: Sequence[Row]) -> int:
    """How long a text can be grown."""
    inputs = sum(len(_ids(row)) for row in rows)
    return min(inputs, sum(len(_decoder_ids(r)) for r in rows)) if model.config.is_encoder_decoder else inputs


def _ids(row: Row) -> Tensor:
    ids: Tensor = row["input_ids"][0]
    return ids


def _decoder_ids(row: Row) -> Tensor:
    if "decoder_input_ids" in row:
        ids: Tensor = row["decoder_input_ids"][0]
        return ids
    labels: Tensor = row["labels"][0]
    return labels[labels != IGNORED]


def _joined(texts: Sequence[Tensor], length: int, count: int) -> Tensor:
    """``(count, length)``: from different texts on, each followed by those after it."""
    count = min(count, len(texts))
    starts = [i * len(texts) // count for i in range(count)]
    return torch.stack([torch.cat([*texts[s:], *texts[:s]])[:length] for s in starts])


def all_see(prefix: Prefix) -> Any:
    """A context in which an infix is seen by every position, for texts that say nothing of input and output."""
    return told(0) if prefix.visible.kind == "infix" else nullcontext()


# ------------------------------------------------------------------------------------------ names and numbers


def labels_of(kinds: Mapping[str, str]) -> dict[str, str]:
    """A short name for each site of a kind: the layer's number, and the kind where there are several."""
    numbers = {n: m[0] if (m := re.search(r"\d+", n)) else "" for n in kinds}
    if len({(kinds[n], number) for n, number in numbers.items()}) < len(kinds):  # these say nothing: count
        numbers = {n: str(i) for i, n in enumerate(kinds)}
    several = len(set(kinds.values())) > 1
    return {n: f"{kinds[n]} {number}" if several else number for n, number in numbers.items()}


def rounded(value: Any) -> Any:
    """Six digits of every number in a JSON value: all that a picture shows, at a third of the size."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value
