"""One trial of a search: a new prefix on the model, trained, looked at as it goes, and taken off again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from foreword.config import PrefixConfig
from foreword.data import Collator, EncodedDataset
from foreword.errors import DivergedError
from foreword.losses import example_losses, supervised_tokens
from foreword.train.arguments import PrefixTrainingArguments
from foreword.train.progress import StopOnSignal
from foreword.train.trainer import PrefixTrainer
from foreword.tuning import attach

Look = Callable[[int, float], bool]


@dataclass(frozen=True)
class Outcome:
    """How a trial went.

    Attributes:
        outcome: ``"stopped"``: by Ctrl-C.
        loss: the last validation loss, in nats a token; None: there was none.
        example_losses: at the end, the sum over each validation example's tokens.
        message: why it diverged.
    """

    outcome: Literal["complete", "pruned", "diverged", "stopped"]
    loss: float | None
    example_losses: list[float]
    seconds: float
    parameters: int
    message: str = ""


@dataclass(frozen=True)
class Runner:
    """What trials have in common.

    Attributes:
        steps: of a trial.
        every: steps between looks at the validation loss; the last step has one as well.
        arguments: fields of :class:`PrefixTrainingArguments`.
        stop: what Ctrl-C sets.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dataset: EncodedDataset
    valid: EncodedDataset
    collator: Collator
    steps: int
    every: int
    seed: int
    arguments: dict[str, Any]
    stop: StopOnSignal

    def run(self, config: PrefixConfig, work: Path, look: Look, stepped: Callable[[int], None]) -> Outcome:
        """Train a new prefix.

        Args:
            work: a folder that nobody else uses.
            look: told of each step with a validation and its loss; says whether to stop there.
            stepped: told of each step.
        """
        began, message = time.monotonic(), ""
        watch = _Watch(self, look, stepped)
        set_seed(self.seed)
        tuning = attach(self.model, config, tokenizer=self.tokenizer)
        try:
            watch.trainer = trainer = self._trainer(work, self.steps, [watch, self.stop])
            try:
                trainer.train()
            except DivergedError as exc:
                watch.outcome, message = "diverged", str(exc).split(" Try a third", 1)[0].split(" The last good", 1)[0]
            if watch.outcome == "diverged" and not message:
                message = f"the validation loss is {watch.loss} after step {trainer.state.global_step}"
            if watch.outcome == "complete" and trainer.state.global_step < self.steps:
                watch.outcome = "stopped"
            loss = watch.loss if watch.loss is not None and math.isfinite(watch.loss) else None
            kept = watch.examples if watch.outcome == "complete" else []
            return Outcome(
                watch.outcome, loss, kept, round(time.monotonic() - began, 3), tuning.num_parameters, message
            )
        finally:
            tuning.detach()

    def time_of_a_step(self, config: PrefixConfig) -> float:
        """Seconds of a training step, once it is warm."""
        clock = _Clock()
        set_seed(self.seed)
        tuning = attach(self.model, config, tokenizer=self.tokenizer)
        try:
            with TemporaryDirectory() as folder:
                self._trainer(Path(folder), 2, [clock]).train()
        except DivergedError:
            pass  # it is a bad trial then, and the steps that it did were timed
        finally:
            tuning.detach()
        return clock.seconds

    def losses(self, trainer: PrefixTrainer) -> list[float]:
        """The negative log-likelihood of each validation example with what is attached, summed over its tokens."""
        with trainer.compute_loss_context_manager():
            return example_losses(
                self.model, self.valid, self.collator, batch_size=trainer.args.per_device_eval_batch_size,
                prepare=trainer._prepare_inputs,
            )  # fmt: skip

    def valid_tokens(self) -> list[int]:
        """Of each validation example, on how many tokens there is a loss."""
        return supervised_tokens(self.valid, seq2seq=self.collator.seq2seq)

    def _trainer(self, folder: Path, steps: int, callbacks: list[TrainerCallback]) -> PrefixTrainer:
        fixed: dict[str, Any] = {
            "output_dir": str(folder), "max_steps": steps, "seed": self.seed, "save_strategy": "no",
            "eval_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "remove_unused_columns": False, "learning_rate": None,
        }  # fmt: skip
        defaults = {"dataloader_pin_memory": False, "per_device_eval_batch_size": 16}
        trainer = PrefixTrainer(
            self.model,
            PrefixTrainingArguments(**{**defaults, **self.arguments, **fixed}),
            train_dataset=self.dataset,
            data_collator=self.collator,
            callbacks=callbacks,
        )
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        return trainer


class _Watch(TrainerCallback):
    """Looks at the validation loss as a trial goes, and ends it where that is bad."""

    def __init__(self, runner: Runner, look: Look, stepped: Callable[[int], None]) -> None:
        self.runner, self.look, self.stepped = runner, look, stepped
        self.trainer: PrefixTrainer
        self.tokens = max(1, sum(runner.valid_tokens()))
        self.outcome: Literal["complete", "pruned", "diverged", "stopped"] = "complete"
        self.loss: float | None = None
        self.examples: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, last = state.global_step, self.runner.steps
        self.stepped(step)
        if step % self.runner.every and step != last:
            return
        self.examples = self.runner.losses(self.trainer)
        self.loss = math.fsum(self.examples) / self.tokens
        if not math.isfinite(self.loss):
            self.outcome = "diverged"
        elif self.look(step, self.loss) and step != last:
            self.outcome = "pruned"
        if self.outcome != "complete":
            control.should_training_stop = True


class _Clock(TrainerCallback):
    """Seconds of the last step."""

    def __init__(self) -> None:
        self.begun = self.seconds = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds = time.monotonic() - self.begun
