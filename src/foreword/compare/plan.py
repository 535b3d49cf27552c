"""The runs of a comparison, and which comes next: decided by what is finished, so that no run is done twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from foreword.compare.budget import Budget
from foreword.compare.rows import Row
from foreword.compare.tasks import digest

Kind = Literal["base", "prompted", "rate", "final"]
Result = dict[str, Any]
BASELINES: Mapping[Kind, str] = {"base": "base model", "prompted": "prompted"}


@dataclass(frozen=True)
class Run:
    """One process's work.

    Attributes:
        kind: ``base``: the model untrained; ``prompted``: with the task's text before it; ``rate``: a trial of a
            learning rate; ``final``: a run that counts.
        factor: its learning rate, as a multiple of the usual one.
        budget: of training; None for what isn't trained.
        timed: whether it also measures how fast it writes.
    """

    kind: Kind
    row: Row | None = None
    seed: int = 0
    factor: float = 1.0
    budget: Budget | None = None
    timed: bool = False

    @property
    def label(self) -> str:
        """Its line in the table."""
        return self.row.label if self.row is not None else BASELINES[self.kind]

    def describe(self) -> str:
        """In a few words, for the progress bar."""
        if self.row is None:
            return self.label
        rates = ", ".join(f"{r:g}" for r in self.row.rates(self.factor))
        return f"{self.label}, " + (
            f"trying rate {rates}" if self.kind == "rate" else f"seed {self.seed}, rate {rates}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything that it depends on, besides the comparison's facts."""
        return {
            "kind": self.kind, "row": self.row.to_json() if self.row is not None else None, "seed": self.seed,
            "factor": self.factor, "budget": self.budget.to_json() if self.budget is not None else None,
            "timed": self.timed,
        }  # fmt: skip

    def key(self, facts: Mapping[str, Any]) -> str:
        """The name of its folder: another run, or the same in another comparison, has another."""
        return digest({"facts": facts, "run": self.to_json()})


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        factors: learning rates to choose among, as multiples of the usual ones.
        share: of the budget, for choosing.
        prompted: whether the base model with the task's text before it is a line as well.
        timed: whether the speed of writing is measured (with the first seed).
    """

    rows: Sequence[Row]
    seeds: Sequence[int]
    budget: Budget
    factors: Sequence[float] = (0.3, 1.0, 3.0)
    share: float = 0.25
    prompted: bool = True
    timed: bool = True

    def __post_init__(self) -> None:
        self.budget.split(len(self.factors), self.share)

    def __len__(self) -> int:
        trials = len(self.factors) if len(self.factors) > 1 else 0
        return 1 + int(self.prompted) + len(self.rows) * (len(self.seeds) + trials)

    def runs(self, finished: Mapping[str, Result], facts: Mapping[str, Any]) -> Iterator[Run]:
        """All runs in order, as far as they are known: a final run is, once its learning rate is chosen.

        The first seed of every line comes before the second of any, so that a whole table is there early.

        Args:
            finished: results by key.
        """
        yield Run("base")
        if self.prompted:
            yield Run("prompted", timed=self.timed)
        for seed in self.seeds:
            for row in self.rows:
                trials = self.trials(row)
                if seed == self.seeds[0]:
                    yield from trials
                factor = self.chosen(row, finished, facts)
                if factor is not None:
                    yield self.final(row, seed, factor)

    def trials(self, row: Row) -> list[Run]:
        """Those of a line's learning rates; none where there is nothing to choose."""
        trial, _ = self.budget.split(len(self.factors), self.share)
        return [] if trial is None else [Run("rate", row, self.seeds[0], f, trial) for f in self.factors]

    def final(self, row: Row, seed: int, factor: float) -> Run:
        """A line's run that counts."""
        _, budget = self.budget.split(len(self.factors), self.share)
        return Run("final", row, seed, factor, budget, timed=self.timed and seed == self.seeds[0])

    def chosen(self, row: Row, finished: Mapping[str, Result], facts: Mapping[str, Any]) -> float | None:
        """The learning rate that validated best; None: not all were tried yet.

        Where all diverged it is the lowest.
        """
        if len(self.factors) == 1:
            return self.factors[0]
        found = [finished.get(run.key(facts)) for run in self.trials(row)]
        if any(result is None for result in found):
            return None
        losses = [result["valid_loss"] if result is not None else None for result in found]
        known = [math.inf if loss is None else float(loss) for loss in losses]
        return self.factors[known.index(min(known))]

    def known(self, finished: Mapping[str, Result], facts: Mapping[str, Any]) -> dict[str, Result]:
        """What is finished, where a run that also measured its writing speed counts as the same run without.

        Such a one has the name of its folder under ``folder``.
        """
        found = dict(finished)
        for run in self.runs(finished, facts):
            folder = replace(run, timed=True).key(facts)
            if folder in finished:
                found.setdefault(run.key(facts), {**finished[folder], "folder": folder})
        return found

    def next(self, finished: Mapping[str, Result], facts: Mapping[str, Any], failed: Sequence[str] = ()) -> Run | None:
        """The first run that is neither finished nor failed just now; None: there is none."""
        for run in self.runs(finished, facts):
            key = run.key(facts)
            if key not in finished and key not in failed:
                return run
        return None
