"""Searching length, learning rate, start and reparameterisation: trials on one frozen model, kept as they are done.

Each trial attaches a new prefix, trains it and detaches it. Optuna draws the points (TPE) and stops trials that fall
behind (the median of the others at the same step); everything is in a journal, so a search goes on after any end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreword.config import PrefixConfig
from foreword.data import Collator, EncodedDataset
from foreword.errors import ConfigError
from foreword.methods import usual_learning_rate
from foreword.train._same import data_digest, mode_kept, model_digest
from foreword.train._study import Study, check_folder
from foreword.train._trial import Outcome, Runner
from foreword.train.progress import SearchProgress, StopOnSignal
from foreword.train.space import FACTORS, Budget, Point, SearchSpace
from foreword.train.tune_report import TuneResult, read_trials, report, write_trials

if TYPE_CHECKING:
    from optuna.trial import Trial

_LOOKS = 5  # validations of a trial, where nothing else is said


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: EncodedDataset,
    valid: EncodedDataset | None,
    out: Path,
    space: SearchSpace | None = None,
    *,
    budget: Budget | None = None,
    steps: int = 100,
    eval_every: int | None = None,
    prune: bool = True,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> TuneResult:
    """Search for a configuration; ``trials.json``, ``best.json`` and ``tune.png`` are in ``out``.

    The model's weights never change. A trial that diverges is a bad one. Ctrl-C, or a kill at any moment, loses the
    trial that was running and nothing else. Processes that share ``out`` share the search: begin it in one, and join
    it from others with ``resume=True``.

    Args:
        valid: what trials are judged by.
        budget: None: 20 trials.
        steps: optimizer steps of a trial.
        eval_every: steps between validations, which the pruning goes by; None: five a trial.
        prune: whether trials that are worse than the median are stopped early.
        seed: of the draws, the order of the data and the initialisation.
        arguments: further fields of :class:`PrefixTrainingArguments`.
        resume: go on with the search in ``out``.

    Raises:
        ConfigError: no validation data; no point of the space can be trained; the budget is too small for one trial;
            ``out`` holds another search, or one and ``resume`` was not asked for.
        MissingPartError: Optuna is not installed.
    """
    if valid is None or not len(valid):
        raise ConfigError("a search is judged by validation examples, and there are none; give some")
    for name, value in (("steps", steps), ("eval_every", eval_every)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}; expected 1 or more")
    space, budget = space or SearchSpace(), budget or Budget(trials=20)
    console = console or Console(stderr=True)
    check_folder(out, resume)
    points, bad = space.points(model, tokenizer)
    for problem in dict.fromkeys(bad.values()):
        console.print(f"left out: {problem}", style="yellow", highlight=False, markup=False)
    runner = Runner(
        model, tokenizer, dataset, valid, Collator.for_tokenizer(tokenizer, seq2seq=model.config.is_encoder_decoder),
        steps, eval_every or math.ceil(steps / _LOOKS), seed, dict(arguments or {}), StopOnSignal(console),
    )  # fmt: skip
    with mode_kept(model):
        estimate = _time_of_a_trial(runner, space, budget.seconds) if budget.seconds is not None else 0.0
        study = Study(out, _described(runner, space, prune), resume)
        try:
            return _Search(study, space, points, budget, estimate, runner, console).run()
        finally:
            study.close()


def _time_of_a_trial(runner: Runner, space: SearchSpace, seconds: float) -> float:
    """An estimate from a step of the default configuration.

    Raises:
        ConfigError: the seconds are not enough for one.
    """
    step = runner.time_of_a_step(space.default())
    if step * runner.steps > seconds:
        raise ConfigError(
            f"a budget of {seconds:g} s is too small: a step takes {step:.3g} s here, so one trial of {runner.steps} "
            f"steps takes {step * runner.steps:.3g} s; give more, or fewer steps"
        )
    return step * runner.steps


def _described(runner: Runner, space: SearchSpace, prune: bool) -> dict[str, Any]:
    """What makes two searches the same one, by names that a message can use."""
    described = {
        **space.to_json(), "steps": runner.steps, "steps between validations": runner.every, "seed": runner.seed,
        "prune": prune, "training arguments": runner.arguments,
        "the model": model_digest(runner.model), "the data": data_digest([runner.dataset, runner.valid]),
    }  # fmt: skip
    return dict(json.loads(json.dumps(described, default=str)))


class _Search:
    """The loop of trials."""

    def __init__(
        self,
        study: Study,
        space: SearchSpace,
        points: Sequence[Point],
        budget: Budget,
        estimate: float,
        runner: Runner,
        console: Console,
    ) -> None:
        self.study, self.space, self.points = study, space, points
        self.budget, self.estimate, self.runner = budget, estimate, runner
        total, unit = (budget.trials, "trials") if budget.trials is not None else (budget.seconds, "s")
        self.progress = SearchProgress(console, float(total or 0), unit)

    def run(self) -> TuneResult:
        stop, first = self.runner.stop, self._default_parameters()
        with stop, self.progress:
            self._show()
            while not stop.asked:
                trial = self.study.begin(self.runner.seed, first, self._wanted)
                if trial is None:
                    break
                try:
                    self._try(trial, first is not None)
                except BaseException:
                    self.study.end(trial, "fail")
                    raise
                self._show()
        with self.study.lock:
            return report(self.study, self.runner.valid_tokens(), interrupted=stop.asked)

    def _try(self, trial: Trial, default_is_a_point: bool) -> None:
        """Draw a configuration, train it and keep how it went."""
        default = bool(trial.user_attrs["default"])
        config = self.space.default() if default and not default_is_a_point else self._draw(trial)
        trial.set_user_attr("config", config.to_json())
        self.progress.trial(trial.number, self.runner.steps)

        def look(step: int, loss: float) -> bool:
            trial.report(loss, step)
            self.progress.step(step, loss)
            # The first look falls into the warm-up; the default is what the others are compared with.
            return not default and step > self.runner.every and trial.should_prune()

        outcome = self.runner.run(config, self.study.work, look, self.progress.step)
        self._keep(trial, outcome)
        with self.study.lock:
            write_trials(self.study)

    def _keep(self, trial: Trial, outcome: Outcome) -> None:
        for name in ("outcome", "seconds", "parameters", "message", "example_losses"):
            trial.set_user_attr(name, getattr(outcome, name))
        # To Optuna, what was pruned is worse than all that was completed: so is what diverged.
        state = {"complete": "complete", "stopped": "fail"}.get(outcome.outcome, "pruned")
        self.study.end(trial, state, outcome.loss if state == "complete" else None)

    def _draw(self, trial: Trial) -> PrefixConfig:
        """A point, and a learning rate for it."""
        reparams = list(dict.fromkeys(p.reparam for p in self.points))
        reparam = trial.suggest_categorical("reparam", reparams)
        every, own = (list(dict.fromkeys(p.init for p in ps)) for ps in (self.points, self._of(reparam)))
        # A parameter of Optuna's has the same choices in every trial.
        init = trial.suggest_categorical("init" if own == every else f"init of {reparam}", own)
        lengths = [p.length for p in self._of(reparam) if p.init == init]
        length = lengths[trial.suggest_int("length, from the shortest", 0, len(lengths) - 1)]
        point = Point(reparam, None if init is None else str(init), length)
        if self.space.learning_rates is not None:
            low, high = self.space.learning_rates
            rate = trial.suggest_float("learning rate", low, high, log=True)
        else:
            usual = usual_learning_rate(self.space.config(point))
            low, high = (usual * f for f in FACTORS)
            rate = usual * trial.suggest_float("learning rate, of the usual", *FACTORS, log=True)
        return self.space.config(point, min(high, max(low, float(f"{rate:.4g}"))))

    def _of(self, reparam: str) -> list[Point]:
        return [p for p in self.points if p.reparam == reparam]

    def _default_parameters(self) -> dict[str, Any] | None:
        """The default configuration as ``_draw`` draws it; None: it is no point of the space."""
        default = self.space.default()
        own = [p for p in self._of(default.reparam) if p.init == default.init]
        lengths = [p.length for p in own]
        rate = default.learning_rate or 0.0
        if self.space.learning_rates is not None:
            name, value, (low, high) = "learning rate", rate, self.space.learning_rates
        else:
            name, value, (low, high) = "learning rate, of the usual", rate / usual_learning_rate(default), FACTORS
        if default.length not in lengths or not low <= value <= high:
            return None
        inits = (list(dict.fromkeys(p.init for p in ps)) for ps in (self.points, self._of(default.reparam)))
        whole, part = inits
        return {
            "reparam": default.reparam, "init" if part == whole else f"init of {default.reparam}": default.init,
            "length, from the shortest": lengths.index(default.length), name: value,
        }  # fmt: skip

    def _wanted(self) -> bool:
        """Whether the budget has room for another trial."""
        counted = self.study.counted()
        if self.budget.trials is not None:
            return len(counted) < self.budget.trials
        took = [t.user_attrs["seconds"] for t in counted if t.user_attrs.get("outcome") == "complete"]
        need = sum(took) / len(took) if took else self.estimate
        return not counted or self._spent() + need <= (self.budget.seconds or 0)

    def _spent(self) -> float:
        """Trials, or seconds of trials."""
        counted = self.study.counted()
        if self.budget.trials is not None:
            return float(len(counted))
        now = time.time()
        begun = (t.datetime_start.timestamp() if t.datetime_start is not None else now for t in counted)
        return sum(t.user_attrs.get("seconds", now - b) for t, b in zip(counted, begun, strict=True))

    def _show(self) -> None:
        losses = [t.loss for t in read_trials(self.study) if t.outcome == "complete" and t.loss is not None]
        self.progress.searched(self._spent(), min(losses, default=None))
