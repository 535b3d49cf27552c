"""From results of runs to the lines of a table: means and spread over seeds, and ratios to the first line."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from foreword.compare.plan import BASELINES, Plan, Result, Run
from foreword.compare.rows import Row

Line = dict[str, Any]


def tabulate(plan: Plan, results: Mapping[str, Result], facts: Mapping[str, Any]) -> list[Line]:
    """A line for the base model, for the prompted one, and for each row that has a finished run.

    Args:
        results: by key, of this comparison.
    """
    lines = [_baseline(run, results.get(run.key(facts))) for run in _baselines(plan)]
    lines += [_line(plan, row, results, facts) for row in plan.rows]
    lines = [line for line in lines if line["runs"]]
    first = next((line for line in lines if line["kind"] == "final"), None)
    for line in lines:
        for name in ("training_seconds", "peak_bytes"):
            line[f"{name}_ratio"] = _ratio(_mean(line[name]), _mean(first[name]) if first is not None else None)
        line["best_epoch"] = best_epoch(line, facts)
    return lines


def best_epoch(line: Mapping[str, Any], facts: Mapping[str, Any]) -> float | None:
    """How often a line had seen its training examples at its best step; None: it isn't trained."""
    step = _mean(line["best_step"])
    examples = line.get("examples") or facts["task"]["data"]["train"]["examples"]
    return None if step is None else step * facts["batch_size"] / examples


def _baselines(plan: Plan) -> list[Run]:
    return [run for run in plan.runs({}, {}) if run.kind in BASELINES]


def _baseline(run: Run, result: Result | None) -> Line:
    line = _empty(run.kind, run.label, run.label)
    return line if result is None else _filled(line, [result])


def _line(plan: Plan, row: Row, results: Mapping[str, Result], facts: Mapping[str, Any]) -> Line:
    line = _empty("final", row.label, row.method)
    line |= {"length": row.length, "examples": row.examples}
    factor = plan.chosen(row, results, facts)
    trials = [(run, results.get(run.key(facts))) for run in plan.trials(row)]
    line["search"] = [
        {"factor": run.factor, "rates": row.rates(run.factor), "valid_loss": r["valid_loss"], "message": r["message"]}
        for run, r in trials
        if r is not None
    ]
    if factor is None:
        return line
    line["rates"], line["factor"] = row.rates(factor), factor
    line["at_the_edge"] = len(plan.factors) > 1 and factor in (min(plan.factors), max(plan.factors))
    found = [results.get(plan.final(row, seed, factor).key(facts)) for seed in plan.seeds]
    return _filled(line, [r for r in found if r is not None])


def _empty(kind: str, label: str, method: str) -> Line:
    return {
        "kind": kind, "label": label, "method": method, "length": None, "examples": None, "runs": 0, "diverged": 0,
        "parameters": 0, "share": 0.0, "stored_bytes": 0, "rates": [], "factor": None, "at_the_edge": False,
        "search": [], "steps": None, "supervised_tokens": None, "training_seconds": None, "peak_bytes": None,
        "best_step": None, "valid_loss": None, "best_valid_loss": None, "speed_ratio": None, "tests": {},
    }  # fmt: skip


def _filled(line: Line, found: Sequence[Result]) -> Line:
    whole = [r for r in found if r["outcome"] == "complete"]
    line |= {"runs": len(found), "diverged": len(found) - len(whole)}
    if not found:
        return line
    line |= {name: found[0][name] for name in ("parameters", "share")}
    line["stored_bytes"] = max(r["stored_bytes"] for r in found)
    line["steps"] = _spread([r.get("steps") for r in whole])
    line["supervised_tokens"] = _spread([r.get("supervised_tokens") for r in whole])
    line["valid_loss"] = _spread([r["valid_loss"] for r in whole])
    line["best_step"] = _spread([(r.get("best") or {}).get("step") for r in whole])
    line["best_valid_loss"] = _spread([(r.get("best") or {}).get("loss") for r in whole])
    for name in ("training_seconds", "peak_bytes"):
        line[name] = _spread([r["measured"][name] for r in whole])
    speeds = [r["measured"]["speed"]["ratio"] for r in whole if r["measured"]["speed"]]
    line["speed_ratio"] = _spread(speeds)
    for test in whole[0]["tests"] if whole else ():
        line["tests"][test] = {m: _metric([r["tests"][test][m] for r in whole]) for m in whole[0]["tests"][test]}
    return line


def _metric(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds; the ends of the bootstrap intervals, averaged over seeds."""
    first = scores[0]
    return {
        **(_spread([s["value"] for s in scores]) or {"mean": None, "sd": None, "values": []}),
        "low": _average([s["low"] for s in scores]), "high": _average([s["high"] for s in scores]),
        "unit": first["unit"], "higher_is_better": first["higher_is_better"], "note": first["note"],
    }  # fmt: skip


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation (of the sample; None of one) of those that are numbers."""
    known = [float(v) for v in values if v is not None]
    if not known:
        return None
    return {
        "mean": statistics.fmean(known), "sd": statistics.stdev(known) if len(known) > 1 else None, "values": known
    }  # fmt: skip


def _average(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if len(known) == len(values) and known else None


def _mean(spread: Mapping[str, Any] | None) -> float | None:
    return None if spread is None else float(spread["mean"])


def _ratio(value: float | None, first: float | None) -> float | None:
    return value / first if value is not None and first else None
