"""Several tasks' examples in one training set, and how often each is drawn.

An epoch has as many draws as there are examples. Each task has a fixed share of them, from its own pack of cards: its
examples are dealt in random order and shuffled again when they run out, also across epochs. The draws of all tasks
are then shuffled together, so that a batch holds several tasks. All of it follows from a seed and the number of the
epoch, so a run that resumes, and every one of several processes, knows the same order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from torch.utils.data import Dataset

from ..errors import ConfigError, DataError

Sampling = Literal["size", "uniform", "temperature"]


class Rows(Protocol):
    """What holds a task's examples: an ``EncodedDataset``, a list of dicts, a ``datasets.Dataset``."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class OfTask(Dataset[dict[str, Any]]):
    """A data set whose examples say their task."""

    def __init__(self, rows: Rows, task: str) -> None:
        self.rows, self.task = rows, task

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "task": self.task}


class TaskMixture(Dataset[dict[str, Any]]):
    """Several tasks' data sets as one: ``PrefixTrainer(model, args, train_dataset=TaskMixture({...}))``.

    An example is that of its data set with ``task``, its name, which ``Collator`` keeps and the model is given. As an
    ``eval_dataset`` it is evaluated task by task.

    Args:
        datasets: by task name; the names are those of ``PrefixConfig(tasks=...)``.
        sampling: how often a task is drawn: ``"size"``, like the number n of its examples (each is drawn once in an
            epoch); ``"uniform"``, all alike; ``"temperature"``, like n^(1/T) (T5, arXiv 1910.10683, section 3.5.2; mT5,
            arXiv 2010.11934, has 1/T = 0.3).
        temperature: T; 1 is ``"size"``, and the larger, the more alike tasks are drawn.

    Raises:
        ConfigError: there is no task, or the sampling is not one of these.
        DataError: a task has no examples.

    Attributes:
        parts: by task, the examples with their ``task``.
        epoch: whose order is drawn next; training sets it.
    """

    def __init__(self, datasets: Mapping[str, Rows], *, sampling: Sampling = "size", temperature: float = 2.0) -> None:
        if not datasets:
            raise ConfigError('a TaskMixture needs a data set for each task, e.g. TaskMixture({"reviews": dataset})')
        if sampling not in ("size", "uniform", "temperature"):
            raise ConfigError(f'sampling={sampling!r}; expected "size", "uniform" or "temperature"')
        if not 1 <= temperature < math.inf:
            raise ConfigError(f'temperature={temperature}; expected 1 (by size) or more; "uniform" is without end')
        for name, rows in datasets.items():
            if not len(rows):
                raise DataError(f"the task {name!r} has no examples; give it some, or leave it out")
        self.parts = {name: OfTask(rows, name) for name, rows in datasets.items()}
        self.sampling, self.temperature = sampling, temperature
        self.epoch = 0
        self._ends = np.cumsum([len(part) for part in self.parts.values()])

    @property
    def tasks(self) -> list[str]:
        """The names, in order."""
        return list(self.parts)

    @property
    def sizes(self) -> dict[str, int]:
        """How many examples each task has."""
        return {name: len(part) for name, part in self.parts.items()}

    @property
    def draws(self) -> dict[str, int]:
        """How often each task is drawn in an epoch: one time or more, by largest remainder; their sum is the length."""
        power = {"size": 1.0, "uniform": 0.0, "temperature": 1 / self.temperature}[self.sampling]
        weights = np.array([size**power for size in self.sizes.values()])
        exact = weights / weights.sum() * len(self)
        draws = np.floor(exact + 1e-9).astype(int)
        for task in np.argsort(draws - exact, kind="stable")[: len(self) - int(draws.sum())]:
            draws[task] += 1
        return dict(zip(self.parts, draws.tolist(), strict=True))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example ``index`` of all tasks' one after the other."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        task = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[self.tasks[task]]
        return part[index - int(self._ends[task]) + len(part)]

    def order(self, seed: int, epoch: int) -> list[int]:
        """The examples of an epoch, in the order of their draws: ``(len,)`` indices."""
        chosen = []
        for number, (draws, end) in enumerate(zip(self.draws.values(), self._ends, strict=True)):
            size = len(self.parts[self.tasks[number]])
            chosen.append(int(end) - size + _dealt(size, epoch * draws, draws, (seed, 1, number)))
        return [int(i) for i in np.random.default_rng((seed, 0, epoch)).permutation(np.concatenate(chosen))]

    def set_epoch(self, epoch: int) -> None:
        """Called by training (accelerate's data loaders) before each epoch."""
        self.epoch = epoch

    def describe(self) -> str:
        """One line for people to read."""
        total = len(self)
        said = [
            f"{name} {size:,} ({draws / total:.0%} of the draws)"
            for (name, size), draws in zip(self.sizes.items(), self.draws.values(), strict=True)
        ]
        return f"{len(said)} tasks: {', '.join(said)}"


def parse_sampling(text: str) -> dict[str, Any]:
    """``"size"``, ``"uniform"``, ``"temperature"`` or ``"temperature:4"`` as arguments of :class:`TaskMixture`.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"(size|uniform|temperature)(?::(\d+(?:\.\d*)?))?", text)
    if found is None or (found[2] and found[1] != "temperature"):
        raise ConfigError(f"the sampling {text!r}; expected size, uniform or temperature:2")
    return {"sampling": found[1], **({"temperature": float(found[2])} if found[2] else {})}


def _dealt(size: int, start: int, count: int, seed: Sequence[int]) -> np.ndarray[Any, Any]:
    """Cards ``start`` to ``start + count`` of a pack of ``size`` that is shuffled again whenever it runs out."""
    first, last = start // size, (start + count - 1) // size
    packs = [np.random.default_rng((*seed, pack)).permutation(size) for pack in range(first, last + 1)]
    return np.concatenate(packs)[start - first * size :][:count]
