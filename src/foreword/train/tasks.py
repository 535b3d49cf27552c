"""What training several tasks in one run needs beside the trainer: their order, their checks, their mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Sampler
from transformers import TrainingArguments

from foreword.data.mixture import TaskMixture
from foreword.errors import ConfigError
from foreword.tuning import Tuning


class MixtureSampler(Sampler[int]):
    """The draws of a mixture's present epoch.

    It has no ``set_epoch`` on purpose: accelerate looks for one on a sampler only as deep as it wraps it without
    resuming, and otherwise on the data set, which always hears of it.
    """

    def __init__(self, mixture: TaskMixture, seed: int) -> None:
        self.mixture, self.seed = mixture, seed

    def __iter__(self) -> Iterator[int]:
        return iter(self.mixture.order(self.seed, self.mixture.epoch))

    def __len__(self) -> int:
        return len(self.mixture)


def prepared(tuning: Tuning, args: TrainingArguments, given: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's arguments, checked; a mixture to evaluate on becomes its parts by task.

    Raises:
        ConfigError: mixtures and prefix have different tasks, or there is nothing that a penalty could keep apart.
    """
    train, valid = given.get("train_dataset"), given.get("eval_dataset")
    strength = orthogonality(args)
    if not 0 <= strength < math.inf:
        raise ConfigError(f"orthogonality={strength}; expected 0 (no penalty) or a positive strength")
    if strength and len(tuning.tasks) < 2:
        has = f"only {tuning.tasks[0]!r}" if tuning.tasks else "none"
        raise ConfigError(
            f"orthogonality={strength} keeps the prefixes of several tasks apart, and this one has {has}; name two or "
            'more, PrefixConfig(tasks=("a", "b")), or leave it out'
        )
    for data, what in ((train, "train"), (valid, "evaluate")):
        if isinstance(data, TaskMixture):
            _check_names(tuning, data, what)
    if isinstance(train, TaskMixture):
        strategy = getattr(args, "train_sampling_strategy", "random")
        if strategy != "random":
            raise ConfigError(
                f"train_sampling_strategy={strategy!r}, and a TaskMixture draws its examples itself; leave it out"
            )
        if missing := [task for task in tuning.tasks if task not in train.parts]:
            raise ConfigError(
                f"the task {missing[0]!r} has no examples: the mixture has {', '.join(train.parts)}; add a data set "
                "for it, or leave it out of PrefixConfig(tasks=...)"
            )
    return {**given, **({"eval_dataset": valid.parts} if isinstance(valid, TaskMixture) else {})}


def orthogonality(args: TrainingArguments) -> float:
    """The strength of the penalty; plain ``TrainingArguments`` have none."""
    return float(getattr(args, "orthogonality", 0.0))


def mean_loss(metrics: Mapping[str, float], prefix: str, names: Mapping[str, Any]) -> dict[str, float]:
    """``{prefix}_loss``, the mean of the losses of what was evaluated apart; empty where none has a loss."""
    losses = [metrics[key] for name in names if (key := f"{prefix}_{name}_loss") in metrics]
    return {f"{prefix}_loss": math.fsum(losses) / len(losses)} if losses else {}


def _check_names(tuning: Tuning, mixture: TaskMixture, what: str) -> None:
    unknown = [task for task in mixture.parts if task not in tuning.tasks]
    if unknown:
        known = f"its tasks are {', '.join(tuning.tasks)}" if tuning.tasks else "it has no tasks"
        raise ConfigError(
            f"the mixture to {what} on has the task {unknown[0]!r}, and the prefix has not ({known}); attach it with "
            f"PrefixConfig(tasks={tuple(mixture.parts)!r})"
        )
