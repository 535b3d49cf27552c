"""What a search leaves: its trials and the best as JSON, a picture, and whether the best is clearly better."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from foreword._begun import write_whole
from foreword.config import PrefixConfig
from foreword.losses import difference
from foreword.train.curves import draw_search

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from foreword.train._study import Study

TRIALS, BEST, PICTURE = "trials.json", "best.json", "tune.png"


@dataclass(frozen=True)
class TrialRecord:
    """A trial.

    Attributes:
        outcome: ``"complete"``; ``"pruned"``: stopped as worse than the others; ``"diverged"``; ``"stopped"``: broken
            off, and doesn't count; ``"running"``, here or in another process.
        default: whether it is the default configuration.
        config: fields of :class:`PrefixConfig`, the learning rate among them; empty: it was broken off before that.
        loss: the last validation loss, in nats a token; None: there was none.
        curve: steps and validation losses.
        parameters: how many numbers were trained.
        message: why it diverged.
    """

    number: int
    outcome: str
    default: bool
    config: dict[str, Any]
    loss: float | None
    curve: list[tuple[int, float]]
    seconds: float | None
    parameters: int | None
    message: str = ""


@dataclass(frozen=True)
class Comparison:
    """The best trial beside the default configuration.

    Attributes:
        gain: how much lower its validation loss is, in nats a token.
        error: the standard error of that, over the validation examples.
        needed: how many of these it takes to be clear.
    """

    gain: float
    error: float
    needed: float

    @property
    def clear(self) -> bool:
        return self.gain > self.needed * self.error


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes:
        best: the complete trial of the lowest validation loss; None: no trial was completed.
        config: its configuration.
        comparison: with the default configuration; None: one of both is missing, or they are the same.
        verdict: the same in a sentence.
        interrupted: whether Ctrl-C ended it early.
    """

    trials: list[TrialRecord]
    best: TrialRecord | None
    config: PrefixConfig | None
    comparison: Comparison | None
    verdict: str
    interrupted: bool


def read_trials(study: Study) -> list[TrialRecord]:
    """The trials of a study, in order."""
    return [_record(t) for t in study.trials()]


def write_trials(study: Study) -> TrialRecord | None:
    """Write ``trials.json`` and, where there is a best trial, ``best.json``. Returns the best."""
    trials = read_trials(study)
    best = min((t for t in trials if t.outcome == "complete"), key=lambda t: t.loss or 0.0, default=None)
    record = {
        "search": study.optuna.user_attrs["search"],
        "best": best.number if best is not None else None,
        "trials": [asdict(t) for t in trials],
    }
    _write(study.folder / TRIALS, record)
    if best is not None:
        _write(study.folder / BEST, best.config)
    return best


def report(study: Study, tokens: Sequence[int], *, interrupted: bool) -> TuneResult:
    """Write all that a search leaves, and say what it found.

    Args:
        tokens: of each validation example, on how many there is a loss.
    """
    best = write_trials(study)
    trials = read_trials(study)
    draw_search([asdict(t) for t in trials], study.folder / PICTURE)
    default = next((t for t in trials if t.default and t.outcome != "stopped"), None)
    comparison = None
    if best is not None and default is not None and default.outcome == "complete" and not best.default:
        losses: dict[int, list[float]] = {t.number: t.user_attrs.get("example_losses", []) for t in study.trials()}
        others = sum(t.outcome in ("complete", "pruned", "diverged") and not t.default for t in trials)
        comparison = compare(losses[best.number], losses[default.number], tokens, others)
    config = PrefixConfig(**best.config) if best is not None else None
    return TuneResult(trials, best, config, comparison, _verdict(best, default, comparison, len(tokens)), interrupted)


def compare(best: Sequence[float], default: Sequence[float], tokens: Sequence[int], others: int) -> Comparison:
    """How much lower the best trial's loss is, and how sure that is.

    The best of many is lucky as well, so what is needed is two-sided 5% shared among them.

    Args:
        best, default: ``(n,)`` losses summed over each example's tokens.
        tokens: ``(n,)``
        others: how many trials the best is the best of.
    """
    gain, error = difference(default, best, tokens)
    return Comparison(gain, error, NormalDist().inv_cdf(1 - 0.025 / max(1, others)))


def _verdict(
    best: TrialRecord | None, default: TrialRecord | None, comparison: Comparison | None, examples: int
) -> str:
    if best is None or best.loss is None:
        return "no trial was completed, so there is no best one"
    if best.default:
        return f"no trial was better than the default configuration ({best.loss:.4f})"
    if comparison is None:
        went = f"was {default.outcome}" if default is not None else "was not tried"
        return f"trial {best.number} is the best ({best.loss:.4f}); the default configuration {went}"
    said = (
        f"trial {best.number} is the best: {comparison.gain:.4f} nats a token below the default configuration, "
        f"standard error {comparison.error:.4f} over {examples} validation examples, one seed each"
    )
    if comparison.clear:
        return f"{said}. That is a clear difference (above {comparison.needed:.1f} standard errors)"
    return f"{said}. That is not a clear difference: it takes {comparison.needed:.1f} standard errors"


def _record(trial: FrozenTrial) -> TrialRecord:
    told = trial.user_attrs
    ended = {"COMPLETE": "complete", "FAIL": "stopped", "RUNNING": "running", "PRUNED": told.get("outcome", "pruned")}
    looks = sorted(trial.intermediate_values.items())
    loss = trial.value if trial.state.name == "COMPLETE" else looks[-1][1] if looks else None
    return TrialRecord(
        trial.number, ended[trial.state.name], bool(told.get("default")), dict(told.get("config", {})), loss, looks,
        told.get("seconds"), told.get("parameters"), str(told.get("message", "")),
    )  # fmt: skip


def _write(path: Path, record: Any) -> None:
    write_whole(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
