"""Back to the last good state with a smaller step, instead of an end: what a run does about divergence.

Without it a loss or a gradient that leaves the finite, or a gradient far beyond the usual, stops the run
(``DivergedError``). With it the parameters and the optimizer's state go back to a copy made some steps ago, every
learning rate shrinks, and the run goes on with the next batch. What happened is in the log and in the prefix's file.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from foreword.errors import ConfigError
from foreword.train.optimizing import scale
from foreword.tuning import tuning_of

_State = tuple[int, list[Tensor], list[dict[str, Any]]]  # the step; parameters; what the optimizer knows of each
EVENT = "rolled_back"  # a line of the Trainer's log, which checkpoints keep


@dataclass
class RollBack(TrainerCallback):
    """Recover from divergence: ``PrefixTrainer(..., callbacks=[RollBack()])``.

    Attributes:
        times: how often in one run; then it stops as it would have.
        factor: what every learning rate is multiplied by each time.
        every: steps between copies. A copy is as large as what is trained and its optimizer state.
        worse: a training loss is divergence too, when its mean over ``window`` batches is this many times the lowest
            such mean and half of what was gained since the start is lost (of several processes: the mean over all).
        window: batches that a mean is of.
        unsure: set by the trainer while fp16's scaler passes steps over, whose gradients say nothing.
    """

    times: int = 3
    factor: float = 1 / 3
    every: int = 10
    worse: float = 1.5
    window: int = 5
    unsure: bool = field(default=False, init=False, repr=False)
    _losses: list[float] = field(
        default_factory=list, init=False, repr=False
    )  # first and lowest mean; the last batches
    _parameters: list[nn.Parameter] = field(default_factory=list, init=False, repr=False)
    _good: _State | None = field(default=None, init=False, repr=False)
    _untried: _State | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.times, self.every, self.window) < 1 or not 0 < self.factor < 1 or self.worse <= 1:
            raise ConfigError(
                f"{self}; expected 1 or more times and steps, a factor between 0 and 1, and worse above 1"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        tuning = tuning_of(kwargs["model"])
        assert tuning is not None
        self._parameters = list(tuning.parameters())
        if self._good is None:  # else a checkpoint brought it
            self._good = self._copied(state, kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._good, self._untried, self._losses = None, None, []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._untried = self._copied(state, kwargs["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A loss and a gradient were computed from it and were well, and the loss isn't on its way up.
        if self._untried is not None and not self.unsure and self._share_lost() < 0.5:
            self._good, self._untried = self._untried, None

    def rising(self, loss: float) -> str:
        """What a batch's loss says of divergence, after those before it; empty: nothing."""
        self._losses.append(loss)
        if len(self._losses) < self.window + 2:
            if len(self._losses) == self.window:  # the first mean is the lowest yet
                self._losses[:0] = [statistics.fmean(self._losses)] * 2
            return ""
        del self._losses[2 : -self.window]
        first, lowest = self._losses[:2]
        mean = statistics.fmean(self._losses[2:])
        if self._share_lost() >= 1:
            return f"the training loss rose to {mean:.3g} (it began at {first:.3g}, and its lowest was {lowest:.3g})"
        self._losses[1] = min(lowest, mean)
        return ""

    def _share_lost(self) -> float:
        """How far the mean loss has risen from the lowest on the way to divergence: 0 to 1, or more."""
        if len(self._losses) < self.window + 2:
            return 0.0
        first, lowest, *recent = self._losses
        limit = max((self.worse - 1) * lowest, (first - lowest) / 2)
        return (statistics.fmean(recent) - lowest) / limit if limit > 0 else 0.0

    @torch.no_grad()
    def recover(self, state: TrainerState, optimizer: Any, scheduler: Any, what: str) -> bool:
        """Go back, if that may be done once more."""
        done = sum(EVENT in entry for entry in state.log_history)
        if self._good is None or done >= self.times:
            return False
        self._untried = None
        if len(self._losses) >= self.window + 2:  # the loss to come is that of the copy again
            self._losses[2:] = [self._losses[1]] * self.window
        step, numbers, states = self._good
        for parameter, number, kept in zip(self._parameters, numbers, states, strict=True):
            parameter.copy_(number)
            parameter.grad = None  # what led here is not applied
            optimizer.state[parameter] = copy.deepcopy(kept)
        scale(optimizer, scheduler, self.factor)
        event: dict[str, Any] = {EVENT: done + 1, "step": state.global_step, "to_step": step, "because": what}
        state.log_history.append(event)
        warnings.warn(
            f"{what} at step {state.global_step + 1}: went back to step {step} with {self.factor:.2g} of the learning "
            f"rate ({done + 1} of {self.times} times)",
            stacklevel=2,
        )
        return True

    def tensors(self) -> dict[str, Tensor]:
        """The copies, for a checkpoint: a run that goes on may have to go back to before it."""
        found: dict[str, Tensor] = {"losses": torch.tensor(self._losses, dtype=torch.float64)}
        for name, kept in (("good", self._good), ("untried", self._untried)):
            if kept is None:
                continue
            step, numbers, states = kept
            found[f"{name}.step"] = torch.tensor(step)
            for i, (number, state) in enumerate(zip(numbers, states, strict=True)):
                found[f"{name}.{i}.number"] = number
                found |= {f"{name}.{i}.state.{key}": torch.as_tensor(value) for key, value in state.items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what :meth:`tensors` gave."""
        self._losses = tensors["losses"].tolist()
        self._good, self._untried = (_unpacked(tensors, name) for name in ("good", "untried"))

    def _copied(self, state: TrainerState, optimizer: Any) -> _State:
        numbers = [p.detach().clone() for p in self._parameters]
        states = [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in self._parameters]
        return state.global_step, numbers, states


def _unpacked(tensors: Mapping[str, Tensor], name: str) -> _State | None:
    if f"{name}.step" not in tensors:
        return None
    numbers: list[Tensor] = []
    states: list[dict[str, Any]] = []
    while (number := tensors.get(f"{name}.{len(numbers)}.number")) is not None:
        start = f"{name}.{len(numbers)}.state."
        states.append({k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)})
        numbers.append(number)
    return int(tensors[f"{name}.step"]), numbers, states
