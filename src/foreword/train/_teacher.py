"""What a teacher says at each answer token: asked once, kept on disk, read by a distillation as often as it likes.

Of each answer token its k likeliest tokens and their log-probabilities are kept, and that of all others together. A
folder holds ``teacher.json``, which says what was asked, and a safetensors file for each ``SHARD`` examples: ``ids``
``(n, k)`` int32 and ``log_probs`` ``(n, k + 1)`` float32, the last column being the others (``(n, k)`` where k is the
whole vocabulary). Files appear whole, so a run that was killed goes on with the first that is missing.

float32, not float16: at 20 tokens a position it is 164 bytes instead of 122, and a student that equals its teacher
has a loss of exactly zero.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword._boundary import told
from foreword._stacks import positioned_stacks
from foreword._under_way import BOUNDARY
from foreword.data import Collator, EncodedDataset
from foreword.errors import ConfigError, DataError
from foreword.positions import find_rotations
from foreword.prefix import Prefix
from foreword.sites import evaluating, input_device
from foreword.sites import sites as find_sites
from foreword.train.progress import Counting
from foreword.tuning import attach

SHARD = 64
NOTE = "teacher.json"
IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"
COLUMN = "teacher"
_IGNORED = -100


# ---------------------------------------------------------------- a text as teacher


def text_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, longest: int) -> int:
    """How many tokens a teacher's text has.

    Args:
        longest: tokens of the longest example, which stands after it.

    Raises:
        ConfigError: it has none, or both together are more than the model's context.
    """
    count = len(tokenizer(text, verbose=False)["input_ids"])
    if not text.strip() or not count:
        raise ConfigError("the teacher's text is empty; give the text that the model is to have read")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and count + longest > limit:
        raise ConfigError(
            f"the teacher's text has {count:,} tokens and the longest example {longest:,}: {count + longest:,}, and "
            f"{type(model).__name__} reads {limit:,} at most (max_position_embeddings). Shorten the text or the "
            "examples (max_length), distil parts of the text one by one and join them (Prefix.join), or take a model "
            "with a longer context"
        )
    return count


def text_teacher(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Prefix:
    """The text as a prefix that answers like the model prompted with it, also where positions are learned."""
    found = [s for s in find_sites(model) if not s.tower]
    fixed = not find_rotations(model, found).keys() >= {s.name for s in found} and positioned_stacks(model, found)
    offset = len(tokenizer(text, verbose=False)["input_ids"]) if fixed else 0
    return Prefix.from_text(model, tokenizer, text, position_offset=offset)


def replaced_bytes(model: PreTrainedModel, teacher: str | Prefix, tokens: int | None) -> int:
    """Bytes that the student stands for: of a text, its keys and values in the model's dtype."""
    if isinstance(teacher, Prefix):
        return teacher.nbytes
    return sum(s.parameters(tokens or 0) for s in find_sites(model) if not s.tower) * model.dtype.itemsize


# ---------------------------------------------------------------- where the answers are


def answered(labels: Tensor, seq2seq: bool) -> Tensor:
    """Which labels are answer tokens that something predicts: ``(B, S)`` bool."""
    found = labels != _IGNORED
    if not seq2seq:  # nothing stands before the first token of a causal model
        found = found & (torch.arange(labels.shape[1], device=labels.device) > 0)
    return found


def answers_in(labels: Sequence[int], seq2seq: bool) -> int:
    """How many there are in the labels of one example."""
    return sum(label != _IGNORED for label in labels[0 if seq2seq else 1 :])


def answer_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """What to call a model with, and which of the logits that it then gives predict an answer token.

    Logits of other positions are left out where the model's forward has ``logits_to_keep``: a vocabulary is wide.

    Args:
        batch: as ``Collator`` makes it; the labels are taken out.

    Returns:
        The arguments, and ``(B, positions)`` bool whose true places are, row by row, those of ``answered``.
    """
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = cast(Any, model).prepare_decoder_input_ids_from_labels(labels=labels)
        return inputs, answered(labels, True)
    predicts = pad(labels[:, 1:] != _IGNORED, (0, 1))  # position t predicts label t + 1
    if "logits_to_keep" in parameters:
        columns = predicts.any(0).nonzero().squeeze(1)
        inputs["logits_to_keep"], predicts = columns, predicts[:, columns]
    return inputs, predicts


# ---------------------------------------------------------------- what is said there


def top_log_probs(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens, ``(n, k)``, and the log-probabilities of these and of all others: ``(n, k + 1)``.

    Args:
        logits: ``(n, vocabulary)``.
    """
    ids = logits.topk(top, dim=-1).indices
    return ids, coarse_log_probs(logits, ids)


def coarse_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the tokens ``ids`` ``(n, k)``, and of all others together: ``(n, k + 1)``, or ``(n, V)``.

    The others' is the log-sum-exp of their logits, not the log of what is left of 1: what is left may be smaller than
    rounding.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, ids)
    if ids.shape[-1] < logits.shape[-1]:
        rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        chosen = torch.cat([chosen, rest], dim=-1)
    return chosen.log_softmax(-1)


# ---------------------------------------------------------------- asking


@dataclass(frozen=True)
class Asking:
    """How a teacher is asked.

    Attributes:
        top: likeliest tokens kept of each position.
        rows: examples in a forward pass.
        rank, world: this process's number and how many there are: they share the shards.
    """

    collator: Collator
    top: int
    rows: int
    rank: int = 0
    world: int = 1


def missing(folder: Path, dataset: EncodedDataset) -> list[int]:
    """The numbers of the shards that aren't there yet."""
    return [n for n in range(-(-len(dataset) // SHARD)) if not _path(folder, n).exists()]


def ask(
    model: PreTrainedModel, teacher: Prefix, dataset: EncodedDataset, folder: Path, how: Asking, bar: Counting
) -> None:
    """Have the model with the teacher attached read all examples, and keep what it says at their answers.

    The teacher's keys and values are shared by all rows of a batch: a document is read once, not once an example.
    """
    wanted = [n for n in missing(folder, dataset) if n % how.world == how.rank]
    bar.skip(len(dataset) - sum(len(_range(n, dataset)) for n in wanted))
    if not wanted:
        return
    tuning = attach(model, teacher)
    try:
        with evaluating(model), torch.no_grad():
            for number in wanted:
                found = _shard(model, [dataset[i] for i in _range(number, dataset)], how, bar)
                path = _path(folder, number)
                temporary = path.with_name(f".{path.name}.{os.getpid()}")  # processes of a sharded base all write it
                save_file(found, temporary)
                temporary.replace(path)
    finally:
        tuning.detach()


def _shard(model: PreTrainedModel, examples: list[dict[str, Any]], how: Asking, bar: Counting) -> dict[str, Tensor]:
    """The answers of some examples, one after another. Examples of like length are read together."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    device, seq2seq = input_device(model), model.config.is_encoder_decoder
    for start in range(0, len(order), how.rows):
        chosen = order[start : start + how.rows]
        plain = [{k: examples[i][k] for k in ("input_ids", "labels", BOUNDARY) if k in examples[i]} for i in chosen]
        batch = {k: v.to(device) for k, v in how.collator(plain).items()}
        inputs, predicts = answer_inputs(model, batch)
        with told(labels=batch["labels"]):
            logits = model(**inputs).logits
        ids, log_probs = top_log_probs(logits[predicts.to(logits.device)], how.top)
        counts = answered(batch["labels"], seq2seq).sum(1).tolist()
        parts = zip(ids.to("cpu", torch.int32).split(counts), log_probs.float().cpu().split(counts), strict=True)
        found |= dict(zip(chosen, parts, strict=True))
        bar.advance(len(chosen))
    return {
        "ids": torch.cat([found[i][0] for i in range(len(examples))]),
        "log_probs": torch.cat([found[i][1] for i in range(len(examples))]),
    }


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


def _range(number: int, dataset: EncodedDataset) -> range:
    return range(number * SHARD, min((number + 1) * SHARD, len(dataset)))


# ---------------------------------------------------------------- reading


class Answers(Sequence[tuple[Tensor, Tensor]]):
    """What a teacher said, example by example: ids ``(n, k)`` and log-probabilities ``(n, k + 1)``, read when asked.

    Raises:
        DataError: on reading, a shard that is missing or doesn't fit the examples.
    """

    def __init__(self, folder: Path, dataset: EncodedDataset, seq2seq: bool) -> None:
        self.folder = folder
        self.ends = [0]  # answer tokens before each example, and at last of all
        for i in range(len(dataset)):
            self.ends.append(self.ends[-1] + answers_in(dataset[i]["labels"], seq2seq))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index // SHARD
        before = self.ends[number * SHARD]
        whole = self.ends[min((number + 1) * SHARD, len(self))] - before
        start, end = self.ends[index] - before, self.ends[index + 1] - before
        path = _path(self.folder, number)
        try:
            with safe_open(path, framework="pt") as file:
                ids, log_probs = file.get_slice("ids"), file.get_slice("log_probs")
                if ids.get_shape()[0] != whole:
                    raise ValueError(f"{ids.get_shape()[0]} answer tokens, and the examples have {whole}")
                return ids[start:end], log_probs[start:end]
        except (SafetensorError, OSError, ValueError) as exc:
            raise DataError(
                f"{path} can't be read: {exc}; delete it and --resume, and the teacher is asked again"
            ) from exc


@dataclass(frozen=True)
class TeacherCollator(Collator):
    """Pads what the teacher said beside the labels: ``teacher_ids`` ``(B, S, k)``, ``teacher_log_probs`` one wider."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(examples)
        labels, told = batch["labels"], [example[COLUMN] for example in examples]
        where = answered(labels, self.seq2seq)
        for name, parts in ((IDS, [ids for ids, _ in told]), (LOG_PROBS, [numbers for _, numbers in told])):
            filled = parts[0].new_zeros(*labels.shape, parts[0].shape[-1])
            filled[where] = torch.cat(parts)
            batch[name] = filled
        return batch


# ---------------------------------------------------------------- what it is of


def digest_of(dataset: EncodedDataset) -> str:
    """Of the ids and labels of all examples."""
    found = sha256()
    for i in range(len(dataset)):
        example = dataset[i]
        found.update(repr((example["input_ids"], example["labels"])).encode())
    return found.hexdigest()[:32]
