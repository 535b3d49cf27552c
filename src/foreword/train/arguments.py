"""Training arguments with defaults that suit a prefix; everything of transformers' own still works."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from foreword.errors import ConfigError


@dataclass
class PrefixTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` for prefixes: warm-up and clipping on, TensorBoard where installed.

    Attributes:
        learning_rate: of the first method that is trained. None chooses by the method: 2e-2 for keys and values
            themselves, 5e-3 for the low-rank product, 1e-3 for the MLP (``foreword.methods.LEARNING_RATES``).
        explode_factor: a gradient norm this many times the usual stops the run. Usual is the largest of the median of
            the last 50, the largest of the first ten, and ``max_grad_norm``.
        orthogonality: strength of a penalty on what the prefixes of several tasks share: their mean squared cosine
            (``foreword.orthogonal.penalty``, from 0 to 1) times this is added to the training loss.
        report_to: None means TensorBoard where it is installed; ``"none"`` means nowhere.

    Raises:
        ConfigError: activations are to be offloaded, and there is no GPU.
    """

    learning_rate: float | None = None  # type: ignore[assignment]
    warmup_steps: float = 0.1
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    logging_steps: float = 5
    explode_factor: float = 1000.0
    orthogonality: float = 0.0
    report_to: str | list[str] | None = None

    def __post_init__(self) -> None:
        if self.report_to is None:
            self.report_to = ["tensorboard"] if importlib.util.find_spec("tensorboard") else "none"
        # The field was renamed within transformers 5; the old name still works there, with a warning.
        new = hasattr(self, "activation_checkpointing_kwargs")
        name = "activation_checkpointing_kwargs" if new else "gradient_checkpointing_kwargs"
        if getattr(self, name) is None and self.gradient_checkpointing_kwargs is None:
            setattr(self, name, {"use_reentrant": False})
        super().__post_init__()
        checkpointing = getattr(self, name)
        if isinstance(checkpointing, dict) and checkpointing.get("offload") and not torch.accelerator.is_available():
            raise ConfigError(
                "offload=True keeps activations in pinned memory beside a GPU, and there is none: on a CPU they are in "
                "its memory already; leave it out"
            )
