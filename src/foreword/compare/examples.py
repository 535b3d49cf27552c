"""From a task's records to what models and metrics take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword.compare.tasks import Records, TaskData
from foreword.data import EncodedDataset, encode
from foreword.data.examples import Unused, collect
from foreword.errors import DataError
from foreword.evaluate.examples import Task, read_tasks, record_of


def tasks_of(records: Records) -> list[Task]:
    return read_tasks(records, unused=Unused())


def given(tasks: Sequence[Task]) -> dict[str, Any]:
    """What metrics take: each where all examples have it."""
    return {
        "references": [t.references for t in tasks] if all(t.references for t in tasks) else None,
        "inputs": [t.input for t in tasks] if all(t.input for t in tasks) else None,
        "labels": [t.label or "" for t in tasks] if all(t.label is not None for t in tasks) else None,
    }


def first_references(name: str, tasks: Sequence[Task]) -> Records:
    """Each test example with the first of its references, whose likelihood is asked for; conversations as they are."""
    for place, task in enumerate(tasks):
        if not task.references:
            raise DataError(f"{name} example {place} has no references (or output); a comparison needs one")
    return [{"input": t.input, "output": t.references[0]} if t.example is None else record_of(t.example) for t in tasks]


def encoded(
    records: Records, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, task: TaskData
) -> EncodedDataset:
    return encode(
        collect(records), tokenizer, max_length=task.max_length, turns=task.turns,
        seq2seq=bool(model.config.is_encoder_decoder),
    )  # fmt: skip
