"""Training for a comparison: every method sees the same examples in the same order, for steps or for seconds."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from foreword.compare.budget import Budget
from foreword.compare.measure import forget_peak, resident
from foreword.compare.settings import Keep
from foreword.compare.tasks import digest
from foreword.data import Collator, EncodedDataset
from foreword.losses import example_losses, supervised_tokens
from foreword.train.arguments import PrefixTrainingArguments
from foreword.train.trainer import PrefixTrainer

_WARMUP = 0.1  # of the budget
_ENDLESS = 10**6  # steps, where the clock decides
Tell = Callable[[Mapping[str, Any]], None]


class Ordered(Dataset[dict[str, Any]]):
    """Epoch after epoch of a data set in orders that a seed gives, as one long data set.

    Args:
        size: examples in all.
    """

    def __init__(self, data: EncodedDataset, seed: int, size: int) -> None:
        self.data, self.seed, self.size = data, seed, size
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[self.place(index)]

    def place(self, index: int) -> int:
        """Where an example stands in the data set."""
        epoch, within = divmod(index, len(self.data))
        if epoch not in self._orders:
            order = list(range(len(self.data)))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch][within]

    def seen(self, steps: int, batch_size: int, *, seq2seq: bool) -> dict[str, Any]:
        """What so many steps trained on: examples, tokens with a loss, and a short name for the order."""
        places = [self.place(i) for i in range(steps * batch_size)]
        tokens = supervised_tokens(self.data, seq2seq=seq2seq)
        return {"examples": len(places), "supervised_tokens": sum(tokens[p] for p in places), "order": digest(places)}


class Paced(PrefixTrainer):
    """Takes the examples as they come; by the clock, its learning rate follows the seconds that are left."""

    clock: Callable[[], float] | None = None  # from 0 to 1

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(cast(Sized, train_dataset if train_dataset is not None else self.train_dataset))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm-up and linear decay, as by steps."""
        if self.clock is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        clock = self.clock
        self.lr_scheduler = LambdaLR(cast(Optimizer, optimizer or self.optimizer), lambda step: _factor(clock(), step))
        self._created_lr_scheduler = True
        return self.lr_scheduler


def _factor(done: float, step: int) -> float:
    """The learning rate's, when that share of the time is over."""
    if step == 0:
        return 0.0 if _WARMUP else 1.0
    return min(1.0, done / _WARMUP) * max(0.0, min(1.0, (1 - done) / (1 - _WARMUP)))


class Watch(TrainerCallback):
    """Times the steps, looks at the validation loss now and then, and ends the run when its seconds are over."""

    def __init__(
        self, budget: Budget, looks: int, valid: Callable[[], float], tell: Tell, better: Callable[[], None]
    ) -> None:
        self.budget, self.looks, self.valid, self.tell, self.better = budget, looks, valid, tell, better
        self.seconds = 0.0
        self.peak: int | None = None
        self.curve: list[dict[str, float]] = []
        self.train: list[dict[str, float]] = []
        self._begun = 0.0
        self._looked = 0
        self._fresh = False

    def done(self, now: float = 0.0) -> float:
        """The share of the seconds that is over, with so many more of the present step."""
        return min(1.0, (self.seconds + now) / (self.budget.seconds or math.inf))

    def clock(self) -> float:
        """The same in the middle of a step."""
        return self.done(time.perf_counter() - self._begun)

    def look(self, step: int) -> None:
        """Validate; what that takes counts for neither time nor memory."""
        loss, best = self.valid(), min((p["loss"] for p in self.curve), default=math.inf)
        self.curve.append({"step": step, "seconds": self.seconds, "loss": loss})
        if loss < best:
            self.better()
        self.tell({"step": step, "valid": loss})
        self._fresh = forget_peak()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.looks > 1:
            self.look(0)
        self._fresh = forget_peak()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._begun
        # Where the mark can't begin anew, it is that of loading or validating, which is not asked for.
        peak = resident("VmHWM") if self._fresh else None
        self.peak = peak if self.peak is None or peak is None else max(self.peak, peak)
        done = self.done() if self.budget.steps is None else state.global_step / self.budget.steps
        self.tell({"step": state.global_step, "done": done})
        if done >= (self._looked + 1) / self.looks:
            self._looked = math.floor(done * self.looks + 1e-9)
            self.look(state.global_step)
        if done >= 1:
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.train.append({"step": state.global_step, "loss": float(logs["loss"])})


def train(
    model: PreTrainedModel,
    data: EncodedDataset,
    valid: EncodedDataset,
    collator: Collator,
    work: Path,
    *,
    budget: Budget,
    batch_size: int,
    seed: int,
    looks: int,
    tell: Tell,
    keep: Keep = "last",
) -> tuple[Watch, dict[str, Any], str]:
    """Train what is attached.

    Args:
        work: a folder of the run's own.
        looks: validations, evenly over the budget; with more than one, there is one before the first step as well.
        keep: the state that is left on the model: the last, or that of the best validation.

    Returns:
        What was watched, what was seen, and why it diverged (empty: it did not).
    """
    from foreword.errors import DivergedError

    steps = budget.steps or _ENDLESS
    ordered = Ordered(data, seed, steps * batch_size)
    tokens = max(1, sum(supervised_tokens(valid, seq2seq=collator.seq2seq)))
    arguments = PrefixTrainingArguments(
        output_dir=str(work), max_steps=steps, seed=seed, per_device_train_batch_size=batch_size,
        save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        logging_steps=max(1, steps // 50) if budget.steps else 1, dataloader_pin_memory=False, learning_rate=None,
        warmup_steps=_WARMUP,
    )  # fmt: skip
    trainer = Paced(model, arguments, train_dataset=ordered, data_collator=collator)

    def loss() -> float:
        with trainer.compute_loss_context_manager():
            found = example_losses(model, valid, collator, batch_size=16, prepare=trainer._prepare_inputs)
        return math.fsum(found) / tokens

    holder, best = trainer.tuning.holder, {}

    def better() -> None:
        if keep == "best":
            best.update({name: tensor.detach().clone() for name, tensor in holder.state_dict().items()})

    watch, message = Watch(budget, looks, loss, tell, better), ""
    if budget.steps is None:
        trainer.clock = watch.clock
    trainer.add_callback(watch)
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    try:
        trainer.train()
    except DivergedError as exc:
        message = str(exc).split(" Try a third", 1)[0].split(" The last good", 1)[0]
    if best:
        holder.load_state_dict(best)
    done = trainer.state.global_step
    if not message and watch.curve and not math.isfinite(watch.curve[-1]["loss"]):
        message = f"the validation loss is {watch.curve[-1]['loss']} after step {done}"
    return watch, {"steps": done, **ordered.seen(done, batch_size, seq2seq=collator.seq2seq)}, message


def subset(records: Sequence[dict[str, Any]], examples: int | None, seed: int) -> list[dict[str, Any]]:
    """So many of the records, drawn by a seed; a smaller draw of the same seed is a part of a larger one."""
    if examples is None:
        return list(records)
    order = list(range(len(records)))
    random.Random(f"subset {seed}").shuffle(order)
    return [records[i] for i in order[:examples]]
