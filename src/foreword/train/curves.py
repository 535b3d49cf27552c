"""The loss curve of a run as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreword._figures import new_figure, save_figure


def draw_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str = "") -> Path:
    """Draw training and validation loss over steps, and thinly the validation loss of each task.

    Args:
        histories: by label, a Trainer's ``state.log_history``.
        path: where the PNG goes.
    """
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for number, (label, history) in enumerate(histories.items()):
        colour = f"C{number}"
        train = [(e["step"], e["loss"]) for e in history if "loss" in e]
        valid = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
        if train:
            axes.plot(*zip(*train, strict=True), color=colour, alpha=0.6, label=f"{label}, training")
        if valid:
            axes.plot(
                *zip(*valid, strict=True),
                color=colour,
                marker="o",
                markersize=4,
                label=f"{label}, validation",
            )
        tasks = dict.fromkeys(m[1] for entry in history for key in entry if (m := re.fullmatch(r"eval_(.+)_loss", key)))
        for task in tasks:
            own = [(e["step"], e[f"eval_{task}_loss"]) for e in history if f"eval_{task}_loss" in e]
            axes.plot(*zip(*own, strict=True), linewidth=1, marker=".", linestyle="--", label=f"{task}, validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    return save_figure(figure, path)


def draw_growth(report: Mapping[str, Any], path: Path) -> Path:
    """Draw the best validation loss at each length of a prefix that grew (``growth_report``)."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    known = [(c["length"], c["best_eval_loss"]) for c in report["curve"] if c["best_eval_loss"] is not None]
    if known:
        axes.plot(*zip(*known, strict=True), marker="o")
        axes.axvline(report["recommended_length"], color="C2", linestyle="--", label="recommended")
        axes.legend()
    axes.set_xlabel("virtual tokens")
    axes.set_ylabel("best validation loss (nats a token)")
    axes.grid(alpha=0.3)
    return save_figure(figure, path)


def draw_meta(history: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the losses before and after adapting over meta-steps (``MetaResult.history``)."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, label in (("before", "at the start"), ("after", "after adapting")):
        axes.plot([e["step"] for e in history], [e[name] for e in history], label=label)
    axes.set_xlabel("meta-step")
    axes.set_ylabel("loss on training tasks (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, path)


def draw_monitor(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Draw gradient norms (log scale) and shares of attention over steps and sites, run by run on common scales.

    Args:
        runs: by label, the lines of ``Monitor``.
        path: where the PNG goes.
    """
    import numpy as np

    figure = new_figure(12, 1 + 4 * len(runs))
    grid = figure.subplots(len(runs), 2, squeeze=False)
    for column, (what, title) in enumerate(
        (("gradient_norm", "gradient norm, log10"), ("attention_share", "share of attention"))
    ):
        tables = []
        for looks in runs.values():
            names = list(looks[0]["sites"]) if looks else []
            rows = [[look["sites"].get(n, {}).get(what) for look in looks] for n in names]
            table = np.array(rows, dtype=float).reshape(len(names), len(looks))
            tables.append(np.log10(np.maximum(table, 1e-12)) if what == "gradient_norm" else table)
        known = np.concatenate([t[np.isfinite(t)] for t in tables])
        limits = {"vmin": known.min(), "vmax": known.max()} if known.size else {}
        for (label, looks), table, axes in zip(runs.items(), tables, grid[:, column], strict=True):
            image = axes.imshow(table, aspect="auto", origin="lower", interpolation="nearest", **limits)
            shown = slice(None, None, max(1, len(looks) // 8))
            axes.set_xticks(range(len(looks))[shown], [look["step"] for look in looks][shown])
            axes.set_xlabel("step")
            axes.set_ylabel("site, from the input up")
            axes.set_title(f"{label}: {title}" if label else title)
            figure.colorbar(image, ax=axes)
    return save_figure(figure, path)


def draw_search(trials: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw a search: loss against learning rate (colour: reparameterisation, size: length), and the best so far.

    Args:
        trials: fields of ``TrialRecord``.
        path: where the PNG goes.
    """
    figure = new_figure(11, 4)
    left, right = figure.subplots(1, 2)
    shown = [t for t in trials if t["loss"] is not None and t["outcome"] not in ("stopped", "running")]
    colours = {"direct": "C0", "mlp": "C1", "low-rank": "C2"}
    for trial in shown:
        config, whole = trial["config"], trial["outcome"] == "complete"
        colour = colours[config["reparam"]]
        left.scatter(
            config["learning_rate"], trial["loss"], s=20 + 4 * (config["length"] or 0), alpha=0.8,
            facecolors=colour if whole else "none", edgecolors="black" if trial["default"] else colour,
        )  # fmt: skip
    for name in dict.fromkeys(t["config"]["reparam"] for t in shown):
        left.scatter([], [], color=colours[name], label=name)
    if shown:
        left.set_xscale("log")
        key = "size: length\nhollow: stopped early\nblack rim: default"
        left.legend(title=key, fontsize="small", title_fontsize="small")
    left.set_xlabel("learning rate")
    left.set_ylabel("validation loss (nats a token)")
    done = [t for t in trials if t["outcome"] == "complete"]
    if done:
        until = [min(d["loss"] for d in done if d["number"] <= t["number"]) for t in trials[trials.index(done[0]) :]]
        right.step([t["number"] for t in trials][-len(until) :], until, where="post", label="best so far")
        right.plot([t["number"] for t in done], [t["loss"] for t in done], "o", alpha=0.6, label="completed trials")
        right.legend(fontsize="small")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel("trial")
    right.set_ylabel("validation loss (nats a token)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return save_figure(figure, path)
