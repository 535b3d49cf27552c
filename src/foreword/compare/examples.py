"""From a task's records to what models and metrics take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword.compare.tasks import Records
from foreword.data import EncodedDataset, encode, read_examples
from foreword.errors import DataError
from foreword.evaluate.examples import Task, read_tasks


def tasks_of(records: Records) -> list[Task]:
    return read_tasks(records)


def given(tasks: Sequence[Task]) -> dict[str, Any]:
    """What metrics take: each where all examples have it."""
    return {
        "references": [t.references for t in tasks] if all(t.references for t in tasks) else None,
        "inputs": [t.input for t in tasks] if all(t.input for t in tasks) else None,
        "labels": [t.label or "" for t in tasks] if all(t.label is not None for t in tasks) else None,
    }


def first_references(name: str, tasks: Sequence[Task]) -> Records:
    """Each test example with the first of its references, whose likelihood is asked for."""
    for place, task in enumerate(tasks):
        if not task.references:
            raise DataError(f"{name} example {place} has no references (or output); a comparison needs one")
    return [{"input": t.input, "output": t.references[0]} for t in tasks]


def encoded(
    records: Records, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int
) -> EncodedDataset:
    return encode(
        read_examples(records), tokenizer, max_length=max_length, seq2seq=bool(model.config.is_encoder_decoder)
    )
