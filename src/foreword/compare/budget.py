"""How long each line of a comparison may train, and how that is shared between choosing a learning rate and the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foreword import _allowance
from foreword.errors import ConfigError

LEAST_STEPS = 2  # of a trial of a learning rate: one of them is warm-up


@dataclass(frozen=True)
class Budget:
    """Optimizer steps, or seconds of training. Exactly one of them.

    Attributes:
        steps: the same number for every method, on the same batches.
        seconds: spent in training steps; validation and evaluation are not counted.

    Raises:
        ConfigError: neither or both are given, or one is not above 0.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        _allowance.check(self.steps, self.seconds, "steps")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``"200"`` or ``"200 steps"``: steps; ``"300s"``, ``"10m"``, ``"2h"``: time.

        Raises:
            ConfigError: it is neither.
        """
        return cls(*_allowance.parse(text, "steps", 200))

    def describe(self) -> str:
        """In words."""
        return f"{self.steps} steps" if self.steps is not None else f"{self.seconds:g} s of training"

    def split(self, trials: int, share: float) -> tuple[Budget | None, Budget]:
        """What one of ``trials`` learning rates is tried with, and what is left for the run itself.

        One rate needs no trial: the run gets everything.

        Args:
            share: of the budget, for all trials together.

        Raises:
            ConfigError: the steps are too few for that.
        """
        if trials < 2:
            return None, self
        if self.seconds is not None:
            return Budget(seconds=share * self.seconds / trials), Budget(seconds=(1 - share) * self.seconds)
        assert self.steps is not None
        trial = int(share * self.steps / trials)
        if trial < LEAST_STEPS:
            least = int(-(-LEAST_STEPS * trials // share))
            raise ConfigError(
                f"a budget of {self.steps} steps leaves {trial} for each of {trials} learning rates (a share of "
                f"{share:g}); expected {LEAST_STEPS} or more: give {least} steps, or one learning rate (--rates 1)"
            )
        return Budget(steps=trial), Budget(steps=self.steps - trials * trial)

    def to_json(self) -> dict[str, float]:
        """The one that is given."""
        return {"steps": self.steps} if self.steps is not None else {"seconds": float(self.seconds or 0)}


def parse_factors(text: str) -> tuple[float, ...]:
    """``"0.3,1,3"``: multiples of each method's usual learning rate to choose among.

    Raises:
        ConfigError: one is not a positive number.
    """
    try:
        found: Sequence[float] = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--rates {text!r}; expected numbers with commas, e.g. 0.3,1,3") from None
    if wrong := [f for f in found if not 0 < f < float("inf")]:
        raise ConfigError(f"a learning rate of {wrong[0]:g} times the usual one; expected a number above 0")
    return tuple(sorted(dict.fromkeys(found)))
