"""What has to be the same again: the model's modes after a run, and model and data when one is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from foreword.data import EncodedDataset
from foreword.fingerprint import Fingerprint


@contextmanager
def mode_kept(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model may be put into training mode; it gets its own back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def model_digest(model: PreTrainedModel) -> str:
    """Twelve letters that another base model doesn't have; where it was loaded from doesn't count."""
    told = Fingerprint.of(model).to_json() | {"base_model": ""}  # folders may be named otherwise elsewhere
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def data_digest(parts: Iterable[EncodedDataset]) -> str:
    """Twelve letters that other examples, or the same in another order, don't have."""
    data = hashlib.sha256()
    for part in parts:
        for i in range(len(part)):
            data.update(json.dumps(part[i], default=str).encode())
        data.update(b"|")
    return data.hexdigest()[:12]
