"""Draw who sees what: queries down, keys across, for each rule of ``visible``. Writes ``docs/images/visibility.png``.

The squares are what the rules themselves say, not a drawing of them.

    python docs/scripts/draw_methods.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from foreword.visibility import parse

VIRTUAL, INPUT, OUTPUT = 3, 4, 4
RULES = {
    "all": "[PREFIX; x; y]",
    "infix": "[x; INFIX; y]",
    "infix:1": "infix:1, seen by the last of x",
    "first:3": "the first 3 positions",
    "window:2:6": "positions 2 to 5",
}
COLOURS = ListedColormap(["#f4f4f2", "#b9c7d8", "#2a7f4f"])  # hidden, text, virtual tokens


def squares(rule: str) -> torch.Tensor:
    """``(S, P + S)``: 0 hidden, 1 a text key that is seen, 2 a virtual token that is seen."""
    length = INPUT + OUTPUT
    positions = torch.arange(length)[None]
    seen = parse(rule).sees(positions, positions, INPUT)[0]
    text = torch.ones(length, length, dtype=torch.long).tril()
    before = 2 * seen[:, None].expand(length, VIRTUAL).long()
    return torch.cat([before, text], 1)


def main() -> None:
    figure = Figure(figsize=(13, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    names = [*(f"x{i + 1}" for i in range(INPUT)), *(f"y{i + 1}" for i in range(OUTPUT))]
    for axes, (rule, title) in zip(figure.subplots(1, len(RULES)), RULES.items(), strict=True):
        axes.pcolormesh(squares(rule), cmap=COLOURS, vmin=0, vmax=2, edgecolors="white", linewidth=1.5)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.set_xticks([i + 0.5 for i in range(VIRTUAL + len(names))], [*["P"] * VIRTUAL, *names], fontsize=7)
        axes.set_yticks([i + 0.5 for i in range(len(names))], names, fontsize=7)
        axes.tick_params(length=0)
        axes.set_title(f'visible="{rule}"\n{title}', fontsize=9)
    out = Path(__file__).parent.parent / "images" / "visibility.png"
    figure.savefig(out, dpi=110)
    print("written:", out)


if __name__ == "__main__":
    main()
