"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str = "") -> Path:
    """Draw training and validation loss over steps.

    Args:
        histories: by label, a Trainer's ``state.log_history``.
        path: where the PNG goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
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
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
    return path
