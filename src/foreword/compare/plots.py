"""Pictures of a comparison: quality against parameters, length, steps and seconds; loss curves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreword._figures import new_figure, save_figure

Line = Mapping[str, Any]
NAMES = {
    "parameters": "Quality against trained parameters",
    "length": "Quality against length",
    "examples": "Quality against training examples",
    "steps": "Validation loss against steps and seconds of training",
    "curves": "Loss in training, run by run",
}
_FILES = (".png", ".svg")
_MAX_PANELS = 3


def draw(lines: Sequence[Line], runs: Sequence[Mapping[str, Any]], out: Path) -> dict[str, list[Path]]:
    """Draw what there is to draw, each as PNG and SVG.

    Args:
        lines: of the table.
        runs: results of final runs, with their ``label`` under ``run``.

    Returns:
        The files by the picture's name. Those of an earlier report that are no longer drawn are removed.
    """
    panels = _panels(lines)
    trained = [line for line in lines if line["kind"] == "final" and line["tests"]]
    figures: dict[str, Any] = {}
    if trained:
        figures["parameters"] = _against(lines, trained, panels, "parameters", "trained parameters")
    for what, label in (("length", "virtual tokens"), ("examples", "training examples")):
        if own := _varied(trained, what):
            figures[what] = _against(lines, own, panels, what, label)
    curves = _by_label(runs)
    if any(r["curve"] for rs in curves.values() for r in rs):
        figures["steps"] = _steps(curves, lines)
        figures["curves"] = _curves(curves)
    for name in NAMES.keys() - figures.keys():
        for suffix in _FILES:
            (out / f"{name}{suffix}").unlink(missing_ok=True)
    return {
        name: [save_figure(figure, out / f"{name}{suffix}") for suffix in _FILES] for name, figure in figures.items()
    }


def _varied(lines: Sequence[Line], what: str) -> list[Line]:
    """Those of methods that are there with several of something."""
    found: dict[str, set[int]] = {}
    for line in lines:
        if line[what] is not None:
            found.setdefault(line["method"], set()).add(line[what])
    return [line for line in lines if line[what] is not None and len(found[line["method"]]) > 1]


def _panels(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Which test and metric are drawn: the loss, and the first metrics, of the first test, then of the others."""
    tests: Mapping[str, Any] = next((line["tests"] for line in lines if line["tests"]), {})
    found = []
    for test, metrics in tests.items():
        wanted = ["loss", *[m for m in metrics if m not in ("loss", "perplexity")]]
        found += [(test, m) for m in (wanted[:_MAX_PANELS] if len(tests) == 1 else wanted[:1])]
    return found[:4]


def _against(
    lines: Sequence[Line], drawn: Sequence[Line], panels: Sequence[tuple[str, str]], what: str, label: str
) -> Any:
    """Methods over what they vary in; other trained lines, and those that aren't trained, as levels."""
    figure = new_figure(4.6 * len(panels) + 1.4, 4)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    methods = list(dict.fromkeys(line["method"] for line in drawn))
    for axes, (test, metric) in zip(grid, panels, strict=True):
        for number, method in enumerate(methods):
            own = sorted((line for line in drawn if line["method"] == method), key=lambda line: line[what])
            scores = [line["tests"].get(test, {}).get(metric) for line in own]
            known = [(line[what], s) for line, s in zip(own, scores, strict=True) if s and s["mean"] is not None]
            if known:
                xs, values = [x for x, _ in known], [s["mean"] for _, s in known]
                errors = [s["sd"] or 0.0 for _, s in known]
                axes.errorbar(xs, values, yerr=errors, marker="o", capsize=3, color=f"C{number % 10}", label=method)
        beyond = _levels(axes, [line for line in lines if line not in drawn], len(methods), (test, metric))
        unit, better = _unit(lines, test, metric)
        axes.set_title(f"{metric}" + (f", {test}" if len({t for t, _ in panels}) > 1 else ""))
        axes.set_xlabel(label + (f"\nbeyond this picture: {', '.join(beyond)}" if beyond else ""))
        axes.set_ylabel(f"{metric}{f' ({unit})' if unit else ''}, {better} is better")
        axes.set_xscale("log")
        if what != "parameters":  # a few round numbers: those are the ticks
            values = sorted({line[what] for line in drawn})
            axes.set_xticks(values, labels=map(str, values))
            axes.minorticks_off()
        axes.grid(alpha=0.3)
    grid[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _levels(axes: Any, lines: Sequence[Line], colour: int, metric: tuple[str, str]) -> list[str]:
    """Draw horizontal lines. Returns, as text, those that would flatten all that is drawn already."""
    low, high = axes.get_ylim()
    beyond, untrained = [], itertools.cycle((":", "--"))
    for line in lines:
        score = line["tests"].get(metric[0], {}).get(metric[1])
        if line["kind"] == "final":
            style, own = "-.", f"C{colour % 10}"
            colour += 1
        else:
            style, own = next(untrained), "grey"
        if not score or score["mean"] is None:
            continue
        if 2 * low - high <= score["mean"] <= 2 * high - low:
            axes.axhline(score["mean"], color=own, linestyle=style, linewidth=1, label=line["label"])
        else:
            beyond.append(f"{line['label']} {score['mean']:.2f}")
    return beyond


def _unit(lines: Sequence[Line], test: str, metric: str) -> tuple[str, str]:
    score = next(line["tests"][test][metric] for line in lines if metric in line["tests"].get(test, {}))
    return score["unit"], "more" if score["higher_is_better"] else "less"


def _by_label(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["run"]["label"], []).append(run)
    return found


def _steps(curves: Mapping[str, Sequence[Mapping[str, Any]]], lines: Sequence[Line]) -> Any:
    """Mean over seeds, with a band of one standard deviation."""
    import numpy as np

    figure = new_figure(12, 4.2)
    left, right = figure.subplots(1, 2)
    for number, (label, runs) in enumerate(curves.items()):
        colour, style = f"C{number % 10}", ("-", "--", ":")[number // 10 % 3]
        points = min((len(r["curve"]) for r in runs if r["curve"]), default=0)
        if not points:
            continue
        table = np.array(
            [[[p["step"], p["seconds"], p["loss"] if p["loss"] is not None else np.nan] for p in r["curve"][:points]]
             for r in runs if r["curve"]], dtype=float,
        )  # fmt: skip
        mean, sd = table.mean(axis=0), table[:, :, 2].std(axis=0, ddof=1) if len(table) > 1 else 0.0
        for axes, column in ((left, 0), (right, 1)):
            axes.plot(mean[:, column], mean[:, 2], style, color=colour, marker=".", label=label)
            axes.fill_between(mean[:, column], mean[:, 2] - sd, mean[:, 2] + sd, color=colour, alpha=0.15, linewidth=0)
    for line in (x for x in lines if x["kind"] == "prompted" and x["valid_loss"]):
        for axes in (left, right):
            axes.axhline(line["valid_loss"]["mean"], color="grey", linestyle="--", linewidth=1, label=line["label"])
    for axes, name in ((left, "steps"), (right, "seconds of training")):
        axes.set_xlabel(name)
        axes.set_ylabel("validation loss (nats a token)")
        axes.grid(alpha=0.3)
        _cut_off(axes, curves)
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _cut_off(axes: Any, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A random start is far above everything else: the picture ends at the base model's loss, or a little above."""
    known = [p["loss"] for runs in curves.values() for r in runs for p in r["curve"] if p["loss"] is not None]
    later = [p["loss"] for runs in curves.values() for r in runs for p in r["curve"][1:] if p["loss"] is not None]
    if later and max(known) > 2 * max(later):
        axes.set_ylim(min(known) - 0.05 * (max(later) - min(known)), max(later) * 1.1)


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(3.4 * columns, 0.4 + 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes, (label, runs) in zip(grid.flat, curves.items(), strict=False):
        for number, run in enumerate(runs):
            train = [(p["step"], p["loss"]) for p in run.get("train", ()) if p["loss"] is not None]
            valid = [(p["step"], p["loss"]) for p in run["curve"] if p["loss"] is not None and p["step"]]
            if train:
                axes.plot(*zip(*train, strict=True), color=f"C{number % 10}", alpha=0.45, linewidth=1)
            if valid:
                name = f"seed {run['run']['seed']}"
                axes.plot(*zip(*valid, strict=True), color=f"C{number % 10}", marker=".", label=name)
        axes.set_title(label, fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    grid[0, 0].legend(fontsize="x-small", title="dots: validation", title_fontsize="x-small")
    figure.supxlabel("step")
    figure.supylabel("loss (nats a token)")
    return figure
