"""The diagnostics as pictures: matplotlib figures, sized for a telephone as well."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, ScalarFormatter

from foreword._figures import new_figure
from foreword.evaluate.inside._rows import labels_of
from foreword.evaluate.inside.attention import AttentionShare, Dilution
from foreword.evaluate.inside.layers import LayerLosses
from foreword.evaluate.inside.norms import Norms
from foreword.evaluate.inside.similarity import Similarity
from foreword.evaluate.inside.spectrum import Spectrum

_WIDTH = 6.4
_SITE = "attention site, from the input up"


def draw_share(share: AttentionShare) -> Figure:
    """Shares by site and head; with and without gates where there are some."""
    panels = {"as trained": share.sites}
    if share.without_gates is not None:
        panels["without its gates"] = share.without_gates
    figure, axes = _figure(1, len(panels), height=_tall(len(share.sites)))
    grids = {title: _grid([s.heads for s in sites]) for title, sites in panels.items()}
    top = max((float(np.nanmax(g)) for g in grids.values() if not np.isnan(g).all()), default=1.0)
    for panel, (title, grid) in zip(axes, grids.items(), strict=True):
        _heat(panel, grid, _names(share.sites), top=top, label="share of attention")
        panel.set_xlabel("query head")
        panel.set_title(title)
    return figure


def draw_positions(share: AttentionShare) -> Figure:
    """Shares against the position of the query, a line a site."""
    kinds = list(dict.fromkeys(s.kind for s in share.sites))
    figure, axes = _figure(len(kinds), 1, height=3.0 * len(kinds))
    for panel, kind in zip(axes, kinds, strict=True):
        own = [s for s in share.sites if s.kind == kind]
        for colour, site in zip(_depths(len(own)), own, strict=True):
            panel.plot(range(1, len(site.positions) + 1), _floats(site.positions), color=colour, linewidth=0.8)
        longest = max(len(s.positions) for s in own)
        mean = _means(_grid([s.positions for s in own]))
        panel.plot(range(1, longest + 1), mean, color="black", linewidth=2, label="mean of sites")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.set_ylim(bottom=0)
        panel.set_xlabel("position in the text")
        panel.set_ylabel("share")
        panel.set_title(f"{kind} attention, dark: near the input")
        panel.legend(fontsize="small")
        panel.grid(alpha=0.3)
    return figure


def draw_dilution(found: Dilution) -> Figure:
    """Shares against the length of the text: by variant, and by site."""
    kinds = list(dict.fromkeys(found.kinds.values()))
    figure, axes = _figure(len(kinds) + 1, 1, height=3.0 * len(kinds) + _tall(len(found.kinds)))
    for panel, kind in zip(axes, kinds, strict=False):
        for number, name in enumerate(found.variants):
            panel.plot(found.lengths, _floats(found.mean(name, kind)), marker="o", color=f"C{number}", label=name)
        panel.plot(found.lengths, found.uniform, "k--", linewidth=1, label="if all tokens were alike")
        panel.set_xscale("log", base=2)
        panel.set_xticks(found.lengths, [str(n) for n in found.lengths])
        panel.set_ylim(bottom=0)
        panel.set_xlabel("tokens of text")
        panel.set_ylabel("share")
        panel.set_title(f"{kind} attention, mean over sites")
        panel.legend(fontsize="small")
        panel.grid(alpha=0.3)
    variant = next((n for n in found.variants if any(x is not None for x in found.mean(n))), "as trained")
    grid = _grid(list(found.variants[variant].values()))
    _heat(axes[-1], grid, list(labels_of(found.kinds).values()), label="share of attention")
    axes[-1].set_xticks(range(len(found.lengths)), [str(n) for n in found.lengths])
    axes[-1].set_xlabel("tokens of text")
    axes[-1].set_title(f"by site, {variant}")
    return figure


def draw_first(share: AttentionShare) -> Figure:
    """The text's first token: what it has in the base model and beside the prefix, and what the prefix took of it."""
    figure, axes = _figure(2, 1, height=5.6)
    x, names = range(len(share.sites)), _names(share.sites)
    above, below = axes
    above.plot(x, _floats([s.first_base for s in share.sites]), "o-", color="C7", label="first token, base model")
    above.plot(x, _floats([s.first for s in share.sites]), "o-", color="C1", label="first token, beside the prefix")
    above.plot(x, _floats([s.mean for s in share.sites]), "o-", color="C0", label="prefix")
    above.plot(
        x, _floats([next(iter(s.tokens), None) for s in share.sites]), "o--", color="C2", label="its first token"
    )
    above.set_ylabel("share of attention")
    below.bar(x, _floats([s.from_first for s in share.sites]), color="C0")
    below.set_ylabel("taken from the first token")
    for panel in axes:
        _name_sites(panel, names)
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    above.legend(fontsize="small")
    return figure


def draw_tokens(share: AttentionShare) -> Figure:
    """Shares by site and virtual token."""
    figure, axes = _figure(1, 1, height=_tall(len(share.sites)))
    _heat(axes[0], _grid([s.tokens for s in share.sites]), _names(share.sites), label="share of attention")
    axes[0].set_xlabel("virtual token")
    return figure


def draw_norms(found: Norms) -> Figure:
    """Norms of keys and values over the sites, the prefix's and the text's."""
    figure, axes = _figure(2, 1, height=5.6)
    x, names = range(len(found.sites)), _names(found.sites)
    for panel, what in zip(axes, ("keys", "values"), strict=True):
        own: list[list[float]] = [getattr(s, what) for s in found.sites]
        panel.fill_between(x, [min(o) for o in own], [max(o) for o in own], color="C0", alpha=0.25, linewidth=0)
        panel.plot(x, [sum(o) / len(o) for o in own], "o-", color="C0", label="virtual tokens, least to most")
        panel.plot(x, _floats([getattr(s, f"text_{what}") for s in found.sites]), "o-", color="C7", label="text")
        first = _floats([getattr(s, f"first_{what[:-1]}") for s in found.sites])
        panel.plot(x, first, "x", color="C1", label="the text's first token")
        _logarithmic(panel)
        panel.set_ylabel(f"norm of {what}")
        _name_sites(panel, names)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def draw_spectra(spectra: Mapping[str, Spectrum]) -> Figure:
    """Eigenvalues, effective ranks and sizes of the change, by label."""
    figure, axes = _figure(3, 1, height=8.4)
    sites = max((s.sites for s in spectra.values()), key=len)
    names, labels = _names(sites), [s.name for s in sites]
    for number, (label, found) in enumerate(spectra.items()):
        colour = f"C{number}"
        for site in found.sites:
            axes[0].plot(range(1, len(site.values) + 1), site.values, color=colour, linewidth=0.4, alpha=0.4)
        middle = np.median(np.nan_to_num(_grid([s.values for s in found.sites])), axis=0)  # nothing: 0
        middle = middle[middle > 0]
        axes[0].plot(range(1, len(middle) + 1), middle, color=colour, linewidth=2.5, label=label)
        x = [labels.index(s.name) for s in found.sites if s.name in labels]
        for panel, what in zip(axes[1:], ("effective_rank", "size"), strict=True):
            panel.plot(x, [getattr(s, what) for s in found.sites if s.name in labels], "o-", color=colour, label=label)
    for panel in axes:
        _logarithmic(panel)
    for plain in (axes[1].yaxis.set_major_formatter, axes[1].yaxis.set_minor_formatter):
        plain(LogFormatter())
    axes[0].set_xlabel("direction, by size")
    axes[0].set_ylabel("part of the variance")
    axes[1].set_ylabel("effective rank")
    axes[2].set_ylabel("size, by the base's output")
    for panel in axes[1:]:
        _name_sites(panel, names)
    for panel in axes:
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def draw_cosines(found: Similarity, names: tuple[str, str]) -> Figure:
    """Cosines of keys and of values, token by token."""
    figure, axes = _figure(1, 2, height=3.2)
    for panel, what in zip(axes, ("keys", "values"), strict=True):
        image = panel.imshow(getattr(found, what), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        panel.set_title(f"cosine of {what}", fontsize="medium")
        panel.set_xlabel(_short(names[1]))
        panel.set_ylabel(_short(names[0]))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes)
    return figure


def draw_likeness(found: Similarity) -> Figure:
    """The likeness of two prefixes, site by site."""
    figure, (panel,) = _figure(1, 1, height=3.2)
    lines: dict[str, list[float | None]] = {
        f"{what}, {measure}": [getattr(getattr(s, what), measure, None) for s in found.sites]
        for measure in ("cosine", "cka", "overlap")
        for what in ("keys", "values")
    }
    lines["memory, cosine"] = [s.memory for s in found.sites]
    lowest = 0.0
    for number, (label, given) in enumerate(lines.items()):
        values = _floats(given)
        if not np.isnan(values).all():
            lowest = min(lowest, float(np.nanmin(values)))
            style = "o-" if number % 2 == 0 else "o--"
            panel.plot(range(len(values)), values, style, color=f"C{number // 2}", label=label)
    _name_sites(panel, _names(found.sites))
    panel.set_ylim(1.05 * lowest - 0.05, 1.05)
    panel.legend(fontsize="small")
    panel.grid(alpha=0.3)
    return figure


def draw_layers(found: LayerLosses) -> Figure:
    """What the loss rises by without each site, and falls by with it alone."""
    figure, axes = _figure(2, 1, height=5.6)
    names = list(labels_of(found.kinds).values())
    x = range(len(names))
    axes[0].bar(x, [found.without[n] - found.whole for n in found.kinds], color="C3")
    axes[0].set_ylabel("loss without it, more (nats)")
    axes[1].bar(x, [found.none - found.only[n] for n in found.kinds], color="C2")
    axes[1].set_ylabel("loss with it alone, less (nats)")
    axes[1].axhline(found.none - found.whole, color="black", linestyle="--", linewidth=1, label="the whole prefix")
    axes[1].legend(fontsize="small")
    for panel in axes:
        panel.axhline(0, color="black", linewidth=0.8)
        _name_sites(panel, names)
        panel.grid(alpha=0.3)
    return figure


def svg(figure: Figure) -> bytes:
    """As SVG, letters as paths: the same on every screen."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


# ------------------------------------------------------------------------------------------ parts of pictures


def _figure(rows: int, columns: int, *, height: float) -> tuple[Figure, list[Axes]]:
    figure: Figure = new_figure(_WIDTH, height)
    return figure, list(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).flatten())


def _tall(sites: int) -> float:
    return min(9.0, 2.4 + 0.12 * sites)


def _names(sites: Sequence[Any]) -> list[str]:
    """Short names of whatever has a name and a kind."""
    return list(labels_of({s.name: s.kind for s in sites}).values())


def _heat(axes: Axes, grid: np.ndarray, names: Sequence[str], *, top: float | None = None, label: str) -> None:
    image = axes.imshow(grid, aspect="auto", origin="lower", interpolation="nearest", vmin=0, vmax=top)
    step = max(1, len(names) // 16)
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.set_ylabel(_SITE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes, label=label)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic scale, where there is anything that it can show."""
    if any((np.asarray(line.get_ydata(), dtype=float) > 0).any() for line in axes.lines):
        axes.set_yscale("log")


def _name_sites(axes: Axes, names: Sequence[str]) -> None:
    step = max(1, -(-len(names) // 12))
    turned = any(len(n) > 3 for n in names)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60 if turned else 0)
    axes.set_xlabel(_SITE)


def _grid(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Rows of different lengths as one array, not-a-number where there is nothing."""
    width = max((len(r) for r in rows), default=0)
    grid = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        grid[i, : len(row)] = _floats(row)
    return grid


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def _means(grid: np.ndarray) -> list[float]:
    """Of each column, of what is known."""
    columns = [c[~np.isnan(c)] for c in grid.T]
    return [float(c.mean()) if len(c) else float("nan") for c in columns]


def _depths(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1)) for i in range(count)]


def _short(name: str) -> str:
    """A name for an axis: dollars would be read as mathematics."""
    return (name if len(name) <= 24 else f"…{name[-23:]}").replace("$", r"\$")
