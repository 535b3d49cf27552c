"""What a search found, as a picture and as words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword._figures import VECTORS, new_figure, save_figure
from foreword.compression.planning import DISTILL, MERGE, PRUNE, UNIFORM, Candidate, Limits
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.compression.result import Compression

_COLOURS = {None: "C0", PRUNE: "C1", UNIFORM: "C2", MERGE: "C3", DISTILL: "C4", "low rank": "C5"}
_MARKS = {
    "": "o",
    "float16": "s",
    "int8": "^",
    "int8 keys and int4 values": "<",
    "int4 keys and int8 values": ">",
    "int4": "v",
}
FORMATS = (".png", *VECTORS)


def check_picture(path: Path) -> None:
    """Raise ConfigError unless a picture can be drawn under this name."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path.name}: a picture is drawn as {', '.join(FORMATS)}; end its name with one of these")


def draw_plans(candidates: Sequence[Candidate], limits: Limits, chosen: Candidate | None, path: Path) -> Path:
    """Draw size against loss: each plan a mark, the limits as lines, the chosen one ringed."""
    check_picture(path)
    figure = new_figure(10, 5)
    axes = figure.subplots()
    shown = [c for c in candidates if abs(c.increase) < float("inf")]
    for candidate in shown:
        way = "low rank" if candidate.plan.numbers.rank is not None else candidate.plan.shorter
        axes.errorbar(
            candidate.nbytes / 1000, candidate.increase, candidate.error if candidate.error < float("inf") else None,
            marker=_MARKS.get(candidate.plan.numbers.name, "D"), color=_COLOURS[way], markersize=6, elinewidth=0.8,
            alpha=0.85,
        )  # fmt: skip
    if chosen is not None:
        axes.scatter(chosen.nbytes / 1000, chosen.increase, s=220, facecolors="none", edgecolors="black", zorder=3)
    _lines(axes, limits)
    _legend(axes, shown)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_xlabel("bytes of prefix.safetensors, in thousands")
    axes.set_ylabel("rise of the held-out loss (nats a token)")
    axes.grid(alpha=0.3, which="both")
    return save_figure(figure, path)


def verdict(result: Compression) -> str:
    """What was found, in one or two sentences."""
    if (chosen := result.best) is not None:
        return (
            f"{chosen.plan.name}: {chosen.nbytes:,} bytes of {result.before_bytes:,} "
            f"({chosen.nbytes / result.before_bytes:.0%}), held-out loss {result.before:.4f} to {chosen.loss:.4f} "
            f"({chosen.increase:+.4f} ± {chosen.error:.4f} nats a token)"
        )
    limits = result.limits
    wanted = [f"{limits.target_bytes:,} bytes"] if limits.target_bytes is not None else []
    wanted += [f"a loss at most {limits.max_loss_increase:g} higher"] if limits.max_loss_increase is not None else []
    near = "; ".join(f"{c.plan.name} ({c.nbytes:,} bytes, {c.increase:+.4f} ± {c.error:.4f})" for c in result.nearest)
    tried = any(c.plan.shorter == DISTILL for c in result.candidates)
    advice = "" if tried else '. Distilling into fewer tokens was not tried: add "distill" to the methods'
    return f"no plan keeps to {' and '.join(wanted)}; the nearest: {near or 'none'}{advice}"


def _lines(axes: Any, limits: Limits) -> None:
    if limits.target_bytes is not None:
        axes.axvline(limits.target_bytes / 1000, color="black", linestyle="--", linewidth=0.8)
    if limits.max_loss_increase is not None:
        axes.axhline(limits.max_loss_increase, color="black", linestyle="--", linewidth=0.8)
    axes.axvline(limits.before_bytes / 1000, color="grey", linestyle=":", linewidth=0.8)


def _legend(axes: Any, shown: Sequence[Candidate]) -> None:
    ways = dict.fromkeys("low rank" if c.plan.numbers.rank is not None else c.plan.shorter for c in shown)
    for way in ways:
        axes.plot([], [], "o", color=_COLOURS[way], label=way or "all tokens")
    for name in dict.fromkeys(c.plan.numbers.name for c in shown if c.plan.numbers.rank is None):
        axes.plot([], [], marker=_MARKS.get(name, "D"), linestyle="", color="grey", label=name or "numbers as they are")
    if shown:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
