"""What a search found, and its records on disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from foreword.compression.planning import Candidate, Limits
from foreword.data import EncodedDataset
from foreword.errors import ConfigError
from foreword.prefix import Prefix

PLANS = "plans.json"
_MEASURED = ("nbytes", "memory_nbytes", "loss", "increase", "error", "seconds")


@dataclass(frozen=True)
class Compression:
    """What ``compress`` found.

    Attributes:
        before: the loss of the prefix as it was, in nats a token.
        before_bytes: of its file.
        candidates: what was tried, in order.
        limits: what was asked for.
        best: the plan that was chosen; None: none is within the limits, or the search was interrupted.
        prefix: what it gives.
        nearest: where there is none: the best within the bytes and the smallest within the loss.
        interrupted: whether Ctrl-C ended it early.
    """

    before: float
    before_bytes: int
    candidates: list[Candidate]
    limits: Limits
    best: Candidate | None
    prefix: Prefix | None
    nearest: list[Candidate]
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "before": {"bytes": self.before_bytes, "loss": self.before},
            "target_bytes": self.limits.target_bytes,
            "max_loss_increase": self.limits.max_loss_increase,
            "best": record_of(self.best) if self.best is not None else None,
            "nearest": [record_of(c) for c in self.nearest],
            "interrupted": self.interrupted,
            "plans": [record_of(c) for c in self.candidates],
        }


def known(folder: Path | None) -> dict[str, dict[str, Any]]:
    """What a search that was broken off has measured, by the names of plans."""
    if folder is None or not (folder / PLANS).is_file():
        return {}
    try:
        records = json.loads((folder / PLANS).read_text(encoding="utf-8"))["plans"]
        return {r["plan"]: {k: r[k] if r[k] is not None else math.nan for k in _MEASURED} for r in records}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{folder / PLANS} can't be read: {exc}; remove it, or give another folder") from exc


def record_of(candidate: Candidate) -> dict[str, Any]:
    numbers = {name: getattr(candidate, name) for name in _MEASURED}
    return {"plan": candidate.plan.name, **{n: x if math.isfinite(x) else None for n, x in numbers.items()}}


def text_of(record: Any) -> str:
    return json.dumps(record, indent=1) + "\n"


def digest_of(dataset: EncodedDataset) -> str:
    digest = sha256()
    for i in range(len(dataset)):
        digest.update(repr(dataset[i]).encode())
    return digest.hexdigest()[:32]
