"""Pictures: matplotlib's figures without a screen, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VECTORS = (".svg", ".pdf")


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of that many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> Path:
    """Write it under a temporary name, then rename; ``.svg`` and ``.pdf`` are vectors, anything else is PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    suffix = path.suffix.lower()
    figure.savefig(temporary, dpi=120, format=suffix[1:] if suffix in VECTORS else "png")
    temporary.replace(path)
    return path
