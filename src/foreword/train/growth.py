"""A prefix that grows while it is trained: as long as a task needs, and the curve that shows it.

A prefix of ``PrefixConfig(length=maximum)`` begins with its first few tokens. When the validation loss no longer falls,
the next ones come in: at weight 0, so that the loss doesn't jump, which rises to 1 over some steps. Their numbers, and
the optimizer's for all others, stay where they are, so checkpoints and several processes know nothing of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from foreword.config import PrefixConfig
from foreword.errors import ConfigError
from foreword.train.curves import draw_growth
from foreword.tuning import Tuning, tuning_of

REPORT = "growth.json"
_EVENT = "prefix_length"  # a line of the Trainer's log, which checkpoints keep


@dataclass
class Growth(TrainerCallback):
    """Grow by ``step`` tokens whenever an evaluation gains too little: ``PrefixTrainer(..., callbacks=[Growth()])``.

    Attributes:
        start: virtual tokens to begin with.
        step: how many come in at a time.
        threshold: the least relative gain of the validation loss from one evaluation to the next; below it, grow.
        settle: optimizer steps until new tokens count fully. No growth begins that couldn't end in time.
        recommend_within: the length recommended is the smallest whose best loss is within this share of the best.
    """

    start: int = 5
    step: int = 5
    threshold: float = 0.01
    settle: int = 20
    recommend_within: float = 0.01
    tuning: Tuning = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("start", 1), ("step", 1), ("settle", 1), ("threshold", 0), ("recommend_within", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"Growth({name}={value}); expected {least} or more")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuning = self._checked(args, state, kwargs["model"])
        self._place(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.tuning.encoder.opening is not None:
            self._place(state, ahead=1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "eval_loss" not in kwargs.get("metrics", ("eval_loss",)):
            return  # one task of several: their mean is still to come
        length, since = self._standing(state)
        losses = [e["eval_loss"] for e in state.log_history if "eval_loss" in e and e["step"] >= since]
        settled = state.global_step >= since + (self.settle if length > self.start else 0)
        room = state.max_steps - state.global_step >= self.settle
        if length >= self.maximum or not (settled and room) or len(losses) < 2:
            return
        if (losses[-2] - losses[-1]) / abs(losses[-2]) < self.threshold:
            longer = min(length + self.step, self.maximum)
            state.log_history.append({_EVENT: longer, "step": state.global_step})
            _settle_steps(self.tuning, kwargs.get("optimizer"), length, longer)
            self._place(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = state.best_global_step if args.load_best_model_at_end else None
        if (
            best is not None
        ):  # its numbers are back, so its length has to be; what came in at that step had no weight yet
            self._place(_as_at(state, best))
        else:
            self._place(state)
        report = growth_report(state.log_history, self.start, self.recommend_within)
        self.tuning.metadata["growth"] = report
        if state.is_world_process_zero and args.output_dir is not None:
            folder = Path(args.output_dir)
            temporary = folder / f".{REPORT}"
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            temporary.replace(folder / REPORT)
            draw_growth(report, folder / "growth.png")

    @property
    def maximum(self) -> int:
        """The length that the prefix was made with."""
        return self.tuning.encoder.longest

    def _checked(self, args: TrainingArguments, state: TrainerState, model: Any) -> Tuning:
        """Raise ConfigError for what can't grow."""
        tuning = tuning_of(model)
        if tuning is None or not isinstance(tuning.config, PrefixConfig):
            raise ConfigError(
                "Growth is for a new prefix; attach one with PrefixConfig(length=the most that it may have)"
            )
        if tuning.encoder.asks == "condition":
            raise ConfigError("a prefix that is made of a condition can't grow; give it the length that it is to have")
        if tuning.encoder.longest <= self.start:
            raise ConfigError(
                f"Growth starts at {self.start} tokens and the prefix has {tuning.encoder.longest} at most; give "
                "PrefixConfig a greater length, or Growth a smaller start"
            )
        if args.eval_strategy == "no":
            raise ConfigError(
                'Growth watches the validation loss; give the trainer an eval_dataset and eval_strategy="steps"'
            )
        between = state.eval_steps if args.eval_strategy == "steps" else state.max_steps / state.num_train_epochs
        first = between * (1 if args.eval_on_start else 2)
        if first + self.settle > state.max_steps:
            raise ConfigError(
                f"Growth would never grow: it compares two validations, the second after {first:g} steps, and leaves "
                f"new tokens {self.settle} steps to settle, and the run has {state.max_steps}; validate more often "
                "(eval_steps), give a smaller settle, or train longer"
            )
        return tuning

    def _standing(self, state: TrainerState) -> tuple[int, int]:
        """The length, and the step that it began at, from the log."""
        events = [e for e in state.log_history if _EVENT in e]
        return (int(events[-1][_EVENT]), int(events[-1]["step"])) if events else (self.start, 0)

    def _place(self, state: TrainerState, ahead: int = 0) -> None:
        """Have the prefix be as long, and its newest tokens count as much, as the log and the step say."""
        length, since = self._standing(state)
        weight = min(1.0, (state.global_step + ahead - since) / self.settle)
        lengths = [self.start, *(int(e[_EVENT]) for e in state.log_history if _EVENT in e)]
        new = length - lengths[-2] if len(lengths) > 1 else 0
        self.tuning.grow_to(length, (new, weight) if new and weight < 1 else None)


def _as_at(state: TrainerState, step: int) -> TrainerState:
    """The state as it was when the loss of this step was measured."""
    history = [e for e in state.log_history if _EVENT not in e or e["step"] < step]
    return replace(state, global_step=step, log_history=history)


@torch.no_grad()
def _settle_steps(tuning: Tuning, optimizer: Any, old: int, new: int) -> None:
    """Give tokens that come in the step sizes of those that stand.

    Adam divides by what it has seen of a gradient's square. Of new tokens it has seen nothing, and would move them
    several times too far.
    """
    for first, parameter in tuning.encoder.by_token():
        seen = optimizer.state.get(parameter, {}).get("exp_avg_sq") if optimizer is not None else None
        if seen is not None and seen.shape[-2] > old - first > 0:
            seen[..., old - first : new - first, :] = seen[..., : old - first, :].mean(-2, keepdim=True)


def growth_report(history: list[dict[str, Any]], start: int, within: float) -> dict[str, Any]:
    """The best validation loss at each length, and the shortest length that is nearly as good as the best.

    A length's losses are those from when its tokens came in until the next ones did.
    """
    curve: list[dict[str, Any]] = [{"length": start, "from_step": 0, "best_eval_loss": None}]
    for entry in history:
        if _EVENT in entry:
            curve.append({"length": entry[_EVENT], "from_step": entry["step"], "best_eval_loss": None})
        elif "eval_loss" in entry and (curve[-1]["from_step"] < entry["step"] or len(curve) == 1):
            best = curve[-1]["best_eval_loss"]
            curve[-1]["best_eval_loss"] = entry["eval_loss"] if best is None else min(best, entry["eval_loss"])
    known = [c for c in curve if c["best_eval_loss"] is not None]
    best = min((c["best_eval_loss"] for c in known), default=None)
    limit = best + within * abs(best) if best is not None else 0.0
    enough = next((c["length"] for c in known if c["best_eval_loss"] <= limit), None)
    return {"curve": curve, "recommended_length": enough, "best_eval_loss": best, "within": within}
