"""Training arguments with defaults that suit a prefix; everything of transformers' own still works."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

# A prefix moves far more per step than weights do, and each way of making it has a step of its own.
LEARNING_RATES = {"direct": 2e-2, "low-rank": 5e-3, "mlp": 1e-3}


@dataclass
class PrefixTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` for prefixes: warm-up and clipping on, TensorBoard where installed.

    Attributes:
        learning_rate: None chooses by what is trained: 2e-2 for keys and values themselves, 5e-3 for the low-rank
            product, 1e-3 for the MLP.
        explode_factor: a gradient norm this many times the median of the last 50 stops the run.
    """

    learning_rate: float | None = None  # type: ignore[assignment]
    warmup_steps: float = 0.1
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    logging_steps: float = 5
    explode_factor: float = field(default=1000.0)
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"use_reentrant": False})

    def __post_init__(self) -> None:
        if self.report_to in (None, [], "none") and importlib.util.find_spec("tensorboard"):
            self.report_to = ["tensorboard"]
        super().__post_init__()
