"""One step of meta-learning: tasks are drawn, each is adapted to from the start, and the start is moved.

Both algorithms work on the parameters of whatever is attached, in place: they are copied, trained on a task, read, and
put back. What differs is what is read off: how far they went (Reptile), or the gradient where they ended (first-order
MAML, which is MAML with the derivative of the inner steps taken as the identity).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from foreword.data import Collator, EncodedDataset
from foreword.train.meta_config import Episode, MetaConfig, draw
from foreword.tuning import Tuning


class NotFiniteError(Exception):
    """A loss, a gradient or a parameter left the finite; the message says which, and where."""


class MetaStep:
    """Updates of the start. The parameters of ``tuning`` are the start before and after each, also after an error.

    Args:
        tuning: what is attached and trainable.
        tasks: their examples, by name.

    Attributes:
        optimizers: ``inner`` and ``outer``: with the parameters, all that a run goes on from.
    """

    def __init__(
        self, tuning: Tuning, config: MetaConfig, tasks: Sequence[tuple[str, EncodedDataset]], collate: Collator
    ) -> None:
        self.tuning, self.config, self.collate = tuning, config, collate
        self.names = [name for name, _ in tasks]
        self.datasets = [dataset for _, dataset in tasks]
        self.sizes = [len(d) for d in self.datasets]
        self.parameters = list(tuning.parameters())
        self.inner = _inner_optimizer(tuning, config)
        self.outer = _outer_optimizer(tuning, config)
        self.rates = [float(group["lr"]) for group in self.outer.param_groups]

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return {"inner": self.inner, "outer": self.outer}

    def __call__(self, step: int) -> dict[str, float]:
        """Do a meta-step, counted from 0.

        Returns:
            means over its tasks, in nats a token: ``before``, the loss at the start, on the first inner batch; and
            ``after``, the loss after the inner steps on the query batch (FOMAML), or that of the last inner batch
            before its step (Reptile).

        Raises:
            NotFiniteError: the start is what it was before.
        """
        torch.manual_seed(self.config.seed * 1_000_003 + step)  # of dropout: a step that is resumed draws the same
        start = [p.detach().clone() for p in self.parameters]
        try:
            episodes = draw(self.config, self.sizes, step)
            total = [torch.zeros_like(p) for p in start]
            losses = []
            for episode in episodes:
                losses.append(self._adapt(episode))
                for sum_, moved in zip(total, self._direction(start), strict=True):
                    sum_ += moved
                self._put(start)
            self._move([t / len(episodes) for t in total], step)
        except BaseException:
            self._put(start)
            raise
        before, after = (sum(pair[i] for pair in losses) / len(losses) for i in (0, 1))
        return {"before": before, "after": after}

    def _adapt(self, episode: Episode) -> tuple[float, float]:
        """Train on a task; FOMAML leaves the query's gradient. Returns the first loss and the last."""
        losses = []
        for number, batch in enumerate(episode.support, 1):
            losses.append(self._backward(episode.task, batch, f"inner step {number}"))
            self.inner.step()
        if episode.query:
            losses.append(self._backward(episode.task, episode.query, "the query batch"))
        return losses[0], losses[-1]

    def _backward(self, task: int, rows: Sequence[int], where: str) -> float:
        """The loss of some examples of a task, its gradient left in the parameters, clipped."""
        self._forget_gradients()
        batch = self._batch(task, rows)
        loss: Tensor = self.tuning.model(**batch).loss
        if not math.isfinite(value := float(loss.detach())):
            raise NotFiniteError(f"the loss is {value} at {where} on the task {self.names[task]!r}")
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf))
        if not math.isfinite(norm):
            raise NotFiniteError(f"the gradient's norm is {norm} at {where} on the task {self.names[task]!r}")
        return value

    def _batch(self, task: int, rows: Sequence[int]) -> dict[str, Any]:
        batch = self.collate([self.datasets[task][i] for i in rows])
        batch.pop("task", None)  # a name; one start is learned for all
        device = self.tuning.model.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    @torch.no_grad()
    def _direction(self, start: Sequence[Tensor]) -> list[Tensor]:
        """What a task says is uphill of the start: the way back from where it ended, or the gradient there."""
        if self.config.algorithm == "reptile":
            return [s - p for s, p in zip(start, self.parameters, strict=True)]
        return [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]

    def _move(self, direction: Sequence[Tensor], step: int) -> None:
        for group, rate in zip(self.outer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.config.factor(step)
        for parameter, way in zip(self.parameters, direction, strict=True):
            parameter.grad = way
        self.outer.step()
        self._forget_gradients()
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise NotFiniteError("the start has numbers that are not finite after the meta-step")

    @torch.no_grad()
    def _put(self, numbers: Sequence[Tensor]) -> None:
        """Have the parameters be these."""
        self._forget_gradients()
        for parameter, number in zip(self.parameters, numbers, strict=True):
            parameter.copy_(number)

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _inner_optimizer(tuning: Tuning, config: MetaConfig) -> Optimizer:
    if config.inner_optimizer == "sgd":
        return SGD(tuning.parameters(), lr=float(config.inner_learning_rate or 0))
    # Momentum would carry one task's direction into the next one.
    return Adam(tuning.parameter_groups(config.inner_learning_rate), betas=(0.0, 0.999))


def _outer_optimizer(tuning: Tuning, config: MetaConfig) -> Optimizer:
    if config.outer_optimizer == "sgd":
        rate = config.meta_learning_rate
        return SGD(tuning.parameters(), lr=1.0 if rate is None else rate)
    return Adam(tuning.parameter_groups(config.meta_learning_rate))
