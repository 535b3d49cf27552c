"""The part of PrefixTrainer that watches for divergence: each pass's loss, each step's gradient.

What is seen costs no more than Trainer's own look at the loss: one number of each comes from the device.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from foreword._offloaded import to_the_end
from foreword.errors import DivergedError
from foreword.train.rollback import RollBack
from foreword.train.watch import Watch
from foreword.tuning import Tuning

LAST_GOOD = "last-good"
_Callback = TypeVar("_Callback", bound=TrainerCallback)


class Watched(Trainer):
    """A Trainer that stops, or goes back, when a prefix's training diverges."""

    tuning: Tuning

    def _begin_watch(self, args: TrainingArguments) -> None:
        self._watch = Watch(getattr(args, "explode_factor", 1000.0), args.max_grad_norm or 0.0)
        self._good: list[Tensor] = []
        self._good_at: int | None = None  # the step that those were copied in

    @property
    def _norms(self) -> deque[float]:
        return self._watch.norms

    @property
    def _scaler(self) -> Any:
        """Of fp16's loss; None: there is none."""
        scaler = self.accelerator.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_watch(self.args)  # a checkpoint then brings what it saw
        return super()._prepare_for_training(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        with to_the_end(model):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        # One process sees its own rows only, and one that stopped or went back alone would leave the others waiting.
        each = loss.detach().float().reshape(1)
        each = self.accelerator.gather(each) if self.args.world_size > 1 else each
        losses: list[float] = each.tolist()
        first = next((i for i, value in enumerate(losses) if not math.isfinite(value)), None)
        if first is not None:
            what = f"the loss is {losses[first]}" + (f" in process {first}" if len(losses) > 1 else "")
            if self._rolled_back(what, skip=True):
                return torch.zeros_like(loss)
            self._stop(what, gather_object([self._batch(inputs)])[first])
        recovery = self._callback(RollBack)
        if recovery is not None and (what := recovery.rising(math.fsum(losses) / len(losses))):
            self._rolled_back(what, skip=True)  # past its times the run goes on: the loss is a number still
        if self._good_at != self.state.global_step:  # accumulated passes have the same parameters
            self._good = [p.detach().clone() for p in self.tuning.parameters()]
            self._good_at = self.state.global_step
        return loss

    def _rolled_back(self, what: str, *, skip: bool = False) -> bool:
        """Whether a :class:`RollBack` took the run back to where it was well.

        Args:
            skip: the step that is under way has still to be judged by fp16's scaler.
        """
        recovery = self._callback(RollBack)
        if recovery is None or not recovery.recover(self.state, self.optimizer, self.lr_scheduler, what):
            return False
        self._good_at = None
        if skip and self._scaler is not None:  # it wants gradients, and passes over what isn't finite
            for parameter in self.tuning.parameters():
                parameter.grad = torch.full_like(parameter, math.nan)
        return True

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._judged(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm)
        return self._judged(found) if grad_norm is None else found  # else it was judged when it was clipped

    def _judged(self, norm: Any) -> Any:
        """The norm of a step's gradient; raises DivergedError, or goes back, if it says so."""
        if norm is None:  # DeepSpeed's
            return norm
        what = self._watch.wrong_with(float(norm), self._scaler)
        if (recovery := self._callback(RollBack)) is not None:
            recovery.unsure = self._watch.skipped > 0
        if not what:
            return norm
        if not self._rolled_back(what):
            self._stop(what)
        self._watch.skipped = 0
        return torch.zeros_like(norm)

    def _stop(self, what: str, batch: str = "") -> None:
        """Save the last good prefix and raise, in every process."""
        saved = ""
        if self._good:
            with torch.no_grad():
                for parameter, good in zip(self.tuning.parameters(), self._good, strict=True):
                    parameter.copy_(good)
            folder = Path(self.args.output_dir or ".") / LAST_GOOD
            if self.args.should_save:
                self.tuning.save(folder)
            self.accelerator.wait_for_everyone()  # the end of one process is the end of all
            saved = f" The last good prefix is in {folder}."
        batch = f" on the batch {batch}" if batch else ""
        raise DivergedError(
            f"training diverged at step {self.state.global_step + 1}: {what}{batch}.{saved} Try a third of the "
            f"learning rate (it was {self._rate:g}), more warm-up or init from a text; look at the batch"
        )

    def _batch(self, inputs: dict[str, Any]) -> str:
        ids = inputs.get("input_ids")
        if ids is None:
            return ", ".join(f"{k} {tuple(v.shape)}" for k, v in inputs.items() if isinstance(v, Tensor))
        decode = getattr(self.processing_class, "decode", None)
        start = decode(ids[0][:24]) if decode is not None else ids[0][:24].tolist()
        return f"of shape {tuple(ids.shape)} that begins {start!r}"

    @property
    def _rate(self) -> float:
        """The highest learning rate, of the first method."""
        if self.optimizer is None:
            return float(self.args.learning_rate)
        group = self.optimizer.param_groups[0]
        return float(group.get("initial_lr", group["lr"]))

    def _callback(self, kind: type[_Callback]) -> _Callback | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, kind)), None)
