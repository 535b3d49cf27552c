"""What a meta-training is: its algorithm and steps, and which examples each of them draws."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from foreword.config import check_learning_rate
from foreword.errors import ConfigError

_CHOICES = {
    "algorithm": ("reptile", "fomaml"),
    "inner_optimizer": ("adam", "sgd"),
    "meta_optimizer": (None, "adam", "sgd"),
}


@dataclass(frozen=True)
class MetaConfig:
    """How a start is learned over many tasks.

    With the start φ and U(φ), the parameters after ``inner_steps`` steps on a task's examples, a meta-step moves φ by

        Reptile (Nichol et al. 2018, arXiv 1803.02999, algorithm 2): φ ← φ + ε · mean over tasks of (U(φ) − φ)
        first-order MAML (Finn et al. 2017, arXiv 1703.03400, section 5.2): φ ← φ − β · mean of ∇L(U(φ)), L on a query
        batch that the inner steps have not seen

    Attributes:
        algorithm: ``"reptile"`` or ``"fomaml"``.
        meta_steps: updates of the start.
        tasks_per_step: tasks that an update is a mean over, drawn anew each time; all of them where there are fewer.
        inner_steps: steps that each of these tasks is adapted for.
        batch_size: examples of an inner step. A task's examples are gone through in random order, again from the
            first where there are too few for all steps.
        query_size: examples of FOMAML's query batch, drawn apart from those of the inner steps; None: as many as
            ``batch_size``.
        inner_optimizer: ``"adam"`` without momentum (β₁ = 0), whose second moments are carried on from task to task,
            as in the Reptile paper; or plain ``"sgd"``.
        inner_learning_rate: None: what is usual for the method (Adam's; SGD has none that is usual).
        meta_optimizer: of φ; None: plain steps for Reptile, Adam for FOMAML, as in the papers.
        meta_learning_rate: ε or β; None: 1 for Reptile's plain steps (all the way to the tasks' mean), else what is
            usual for the method.
        anneal: whether the meta learning rate falls linearly, towards 0 after the last step (Reptile's).
        clip: the most that the norm of a gradient may be, of inner steps and of FOMAML's queries; 0: anything.
        save_every: meta-steps from one saved state to the next.
        seed: of the tasks and examples drawn, and of dropout.
    """

    algorithm: Literal["reptile", "fomaml"] = "reptile"
    meta_steps: int = 100
    tasks_per_step: int = 4
    inner_steps: int = 5
    batch_size: int = 4
    query_size: int | None = None
    inner_optimizer: Literal["adam", "sgd"] = "adam"
    inner_learning_rate: float | None = None
    meta_optimizer: Literal["adam", "sgd"] | None = None
    meta_learning_rate: float | None = None
    anneal: bool = True
    clip: float = 1.0
    save_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}")
        for name in ("meta_steps", "tasks_per_step", "inner_steps", "batch_size", "query_size", "save_every"):
            value = getattr(self, name)
            if value is None and name == "query_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}; expected a whole number, 1 or more")
        for name in ("inner_learning_rate", "meta_learning_rate"):
            check_learning_rate(getattr(self, name), name)
        if not 0 <= self.clip < float("inf"):
            raise ConfigError(f"clip={self.clip}; expected a norm above 0, or 0 for no clipping")
        if self.query_size is not None and self.algorithm == "reptile":
            raise ConfigError('query_size is of FOMAML\'s query batch, which Reptile has not; use algorithm="fomaml"')
        for part in ("inner", "meta"):
            chosen = self.inner_optimizer if part == "inner" else self.outer_optimizer
            plain = part == "meta" and self.algorithm == "reptile"  # its rate is a share of the way, usually 1
            if chosen == "sgd" and not plain and getattr(self, f"{part}_learning_rate") is None:
                raise ConfigError(
                    f'{part}_optimizer="sgd" has no usual learning rate (those of the methods are Adam\'s); give '
                    f"{part}_learning_rate"
                )

    @property
    def outer_optimizer(self) -> str:
        """What moves the start: ``"sgd"`` or ``"adam"``."""
        return self.meta_optimizer or ("sgd" if self.algorithm == "reptile" else "adam")

    @property
    def query(self) -> int:
        """Examples of a query batch; 0 for Reptile."""
        return 0 if self.algorithm == "reptile" else self.query_size or self.batch_size

    @property
    def least(self) -> int:
        """Examples that a task has to have."""
        return self.batch_size + self.query

    def factor(self, step: int) -> float:
        """What the meta learning rate is multiplied by at a step, counted from 0."""
        return 1 - step / self.meta_steps if self.anneal else 1.0

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it; ``MetaConfig(**...)`` reads it back."""
        return asdict(self)


@dataclass(frozen=True)
class Episode:
    """One task in one meta-step.

    Attributes:
        task: its number.
        support: the examples of each inner step, by number.
        query: those of the query batch, none of which is in ``support``; empty for Reptile.
    """

    task: int
    support: list[list[int]]
    query: list[int]


def draw(config: MetaConfig, sizes: Sequence[int], step: int) -> list[Episode]:
    """The tasks and examples of a meta-step: the same for the same seed and step, whatever was drawn before.

    Args:
        sizes: how many examples each task has.
        step: counted from 0.
    """
    chance = random.Random(f"{config.seed}/{step}")
    episodes = []
    for task in chance.sample(range(len(sizes)), min(config.tasks_per_step, len(sizes))):
        wanted = config.query + config.inner_steps * config.batch_size
        chosen = chance.sample(range(sizes[task]), min(sizes[task], wanted))
        query, rest = chosen[: config.query], itertools.cycle(chosen[config.query :])
        support = [list(itertools.islice(rest, config.batch_size)) for _ in range(config.inner_steps)]
        episodes.append(Episode(task, support, query))
    return episodes
