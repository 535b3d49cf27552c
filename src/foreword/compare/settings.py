"""What all runs of a comparison have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword.errors import ConfigError
from foreword.models import load_model

Keep = Literal["last", "best"]


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Attributes:
        model, dtype, attn: as for ``fw.load_model``.
        looks: validations of a run.
        intervals: bootstrap resamples.
        keep: what is tested of a run: its ``last`` state, or that of the ``best`` validation (early stopping).
    """

    model: str
    dtype: str | None = None
    attn: str | None = None
    batch_size: int = 8
    looks: int = 8
    intervals: int = 1000
    keep: Keep = "last"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("looks", 1), ("intervals", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name}={value}; expected {least} or more")
        if self.keep not in ("last", "best"):
            raise ConfigError(f"keep={self.keep!r}; expected 'last', or 'best' for the state of the best validation")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_model(self.model, dtype=self.dtype, attn=self.attn)

    def to_json(self) -> dict[str, Any]:
        """What the results depend on; the model goes by its weights."""
        tested = {"tested": "best validation"} if self.keep == "best" else {}
        return {"batch_size": self.batch_size, "looks": self.looks, "intervals": self.intervals, **tested}
