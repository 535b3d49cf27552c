"""About how long a comparison takes, from a few measured steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from foreword.compare import process
from foreword.compare.comparison import Comparison
from foreword.compare.plan import Run

_FORWARD = 1 / 3  # of a step: a forward pass without the backward one
_LOADING = 5.0  # seconds


def estimate(comparison: Comparison, told: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Seconds of each line and of all: training as measured, validation at a third of a step for a batch.

    Writing is measured on the base model for a few test examples; what a metric's own model takes is left out.

    Returns:
        ``runs``, ``seconds``, ``training_seconds`` and ``lines``, each with ``label``, ``runs``,
        ``seconds_a_step`` and ``seconds``.
    """
    settings, task, plan = comparison.settings, comparison.task, comparison.plan
    steps: dict[str, float] = process.call(
        "probing:time_steps", settings, task, list(plan.rows), plan.seeds[0],
        tell=lambda what: told(str(what["checking"])) if told is not None else None,
    )  # fmt: skip
    writing = steps.pop("", 0.0) * sum(len(part) for part in task.tests.values())
    usual = min(steps.values(), default=0.0)
    forward = usual * _FORWARD / settings.batch_size
    tested = writing + forward * sum(len(part) for part in task.tests.values())
    looks = len(task.valid) * forward

    def training(run: Run) -> float:
        if run.budget is None or run.row is None:
            return 0.0
        return run.budget.seconds or (run.budget.steps or 0) * steps[run.row.label]

    def seconds(run: Run) -> float:
        if run.kind == "rate":
            return _LOADING + training(run) + looks
        return _LOADING + training(run) + looks * (settings.looks + 1 if run.row is not None else 1) + tested

    lines: list[dict[str, Any]] = []
    for run in plan.runs({}, {}):
        if run.row is None:
            own = {"label": run.label, "runs": 1, "seconds_a_step": None, "training_seconds": 0.0}
            lines.append({**own, "seconds": seconds(run)})
    for row in plan.rows:
        runs = [*plan.trials(row), *(plan.final(row, seed, 1.0) for seed in plan.seeds)]
        lines.append({
            "label": row.label, "runs": len(runs), "seconds_a_step": steps[row.label],
            "seconds": sum(map(seconds, runs)), "training_seconds": sum(map(training, runs)),
        })  # fmt: skip
    return {
        "runs": len(plan), "seconds": sum(line["seconds"] for line in lines),
        "training_seconds": sum(line["training_seconds"] for line in lines), "lines": lines,
    }  # fmt: skip
